//! Training: averages over unequal batches, what a training that has ended does.
