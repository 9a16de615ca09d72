//! Values computed from the parameters.

use std::sync::{Mutex, OnceLock, PoisonError};

/// Something computed from the parameters when first needed and kept until they change.
pub(crate) struct Lazy<T> {
    value: OnceLock<T>,
    /// The previous value, whose memory the next one reuses.
    retired: Mutex<Option<Box<T>>>,
}

impl<T> Lazy<T> {
    pub(crate) const fn new() -> Self {
        Lazy { value: OnceLock::new(), retired: Mutex::new(None) }
    }

    /// Two threads that need it at the same time may both compute it, and one result is kept. Waiting for the other instead
    /// could deadlock: a thread that computes may have to take up another task in between, and that task may wait for it.
    pub(crate) fn get(&self, compute: impl FnOnce() -> T) -> &T {
        self.get_again(|_| compute())
    }

    /// As [`get`](Self::get); `compute` gets the value that was [retired](Self::retire), if there is one, for its
    /// memory.
    pub(crate) fn get_again(&self, compute: impl FnOnce(Option<T>) -> T) -> &T {
        if let Some(value) = self.value.get() {
            return value;
        }
        let retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner).take();
        let value = compute(retired.map(|retired| *retired));
        self.value.get_or_init(|| value)
    }

    /// To be called wherever parameters are lent out for changing.
    pub(crate) fn forget(&mut self) {
        self.value = OnceLock::new();
    }

    /// Whether there is neither a value nor one that was [retired](Self::retire).
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn is_empty(&self) -> bool {
        self.value.get().is_none() && self.retired.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// As [`forget`](Self::forget), but the value is kept for its memory.
    pub(crate) fn retire(&mut self) {
        if let Some(value) = self.value.take() {
            *self.retired.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(value));
        }
    }
}

/// A clone computes its own.
impl<T> Clone for Lazy<T> {
    fn clone(&self) -> Self {
        Lazy::new()
    }
}
