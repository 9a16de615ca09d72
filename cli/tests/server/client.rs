//! A server to test, and a client of few words.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions};
use serde_json::Value;

/// A folder with a small model of random weights and the published tokenizer.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("small");
        let mut config = HymbaLmConfig::hymba_1_5b();
        (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (100, 64, 3);
        std::fs::create_dir_all(&folder).unwrap();
        HymbaLm::random(config, 1, &LoadOptions::default()).unwrap().save_dir(&folder).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let from = Path::new("../tests/data/hymba-1.5b-base").join(name);
            std::fs::copy(from, folder.join(name)).unwrap();
        }
        folder
    })
}

pub struct Server {
    pub child: Child,
    pub address: SocketAddr,
}

impl Server {
    pub fn language(arguments: &[&str]) -> Self {
        Self::start(folder(), arguments)
    }

    pub fn start(model: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hymba"));
        command.arg("serve").arg(model).args(["--port", "0"]).args(arguments).env_remove("HYMBA_API_KEY");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit('/').next().unwrap().parse().expect("it says where it listens");
        Server { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        stream
    }

    /// Sends a request, and does not wait for the answer.
    pub fn begin(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let text = format!("{head}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    pub fn begin_post(&self, path: &str, body: &Value) -> TcpStream {
        self.begin(&format!("POST {path} HTTP/1.1\r\nContent-Type: application/json"), &body.to_string())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::read(self.begin_post(path, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        Answer::read(self.begin(&format!("GET {path} HTTP/1.1"), ""))
    }

    /// The numbers of `/metrics` by their names.
    pub fn metrics(&self) -> std::collections::BTreeMap<String, f64> {
        let text = self.get("/metrics").body;
        let numbers = text.lines().filter(|line| !line.starts_with('#'));
        numbers.filter_map(|line| line.rsplit_once(' ')).map(|(name, n)| (name.into(), n.parse().unwrap())).collect()
    }

    /// Waits until a number has a value.
    pub fn wait_for(&self, name: &str, value: f64) {
        for _ in 0..600 {
            if self.metrics()[name] == value {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{name} is {} and not {value}", self.metrics()[name]);
    }

    #[cfg(target_os = "linux")]
    pub fn terminate(&self) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let head = head.to_ascii_lowercase();
        let body = if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_owned() };
        Answer { status, head, body }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The answer of a request that is served.
    pub fn good(self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// The data of server-sent events.
    pub fn events(&self) -> Vec<String> {
        assert!(self.head.contains("text/event-stream"), "{self:?}");
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole += &rest[..length];
        body = rest[length..].trim_start_matches("\r\n");
    }
    whole
}
