//! Ctrl-C and SIGTERM: the first asks the work to stop where nothing is lost, a second one ends the program.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

/// The exit code of a program that Ctrl-C ended: 128 and the signal's number.
pub const EXIT_CODE: u8 = 130;

/// The error of a command that has ended early, and what that means.
#[derive(Debug)]
pub struct Interrupted(pub &'static str);

impl Interrupted {
    /// Of a training, which keeps a checkpoint.
    pub const TRAINING: Interrupted = Interrupted("finished epochs are kept; run the same command again to continue");
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted: {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

static ASKED: AtomicBool = AtomicBool::new(false);

static LISTENING: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C only asks. So call it where what goes on looks at [`asked`].
pub fn listen() -> Result<()> {
    if LISTENING.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    Ok(ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
    })?)
}

/// Whether it was pressed since the last [`forget`].
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Breaks when it was pressed.
pub fn flow() -> ControlFlow<()> {
    if asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// The work goes on with something else.
pub fn forget() {
    ASKED.store(false, Ordering::Relaxed);
}
