//! Running the program.

use std::io::Write;
use std::process::{Command, Stdio};

pub struct Out {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Out {
    /// What it wrote, if all went well.
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self.stdout
    }

    pub fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.success()).unwrap()
    }
}

/// A file or folder of the test data.
pub fn data(name: &str) -> String {
    format!("{}/../tests/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A file of the data that the examples learn from.
pub fn examples(name: &str) -> String {
    format!("{}/../examples/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hymba"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn hymba(arguments: &[&str]) -> Out {
    hymba_with(arguments, "")
}

pub fn hymba_with(arguments: &[&str], input: &str) -> Out {
    let mut child = command(arguments).spawn().unwrap();
    // a program that has ended before does not read it
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let out = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Out { code: out.status.code().unwrap_or(-1), stdout: text(out.stdout), stderr: text(out.stderr) }
}
