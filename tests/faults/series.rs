//! Series in `.ts` files, as the examples read them.
