//! Values that follow from the parameters.

use std::sync::OnceLock;

/// Something computed from the parameters when first needed and kept until they change.
pub(crate) struct Lazy<T>(OnceLock<T>);

impl<T> Lazy<T> {
    pub(crate) const fn new() -> Self {
        Lazy(OnceLock::new())
    }

    /// Two threads that need it at the same time may both compute it, and one result is kept. Waiting for the other instead
    /// could deadlock: a thread that computes may have to take up another task in between, and that task may wait for it.
    pub(crate) fn get(&self, compute: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.0.get() {
            return value;
        }
        let value = compute();
        self.0.get_or_init(|| value)
    }

    /// To be called wherever parameters are lent out for changing.
    pub(crate) fn forget(&mut self) {
        self.0 = OnceLock::new();
    }
}

/// A clone computes its own.
impl<T> Clone for Lazy<T> {
    fn clone(&self) -> Self {
        Lazy::new()
    }
}
