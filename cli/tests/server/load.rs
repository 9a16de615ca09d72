//! Many clients at once, of all kinds.

use std::io::Read;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Answer, Server};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// Served, refused, left.
type Counts = [u64; 3];

fn client(server: &Server, seed: u64, requests: usize) -> Counts {
    let (mut random, mut counts) = (Random(seed), [0; 3]);
    for _ in 0..requests {
        let prompt = "All work and no play. ".repeat(1 + random.below(12) as usize);
        let (tokens, stream) = (1 + random.below(40), random.below(2) == 0);
        let body = json!({"prompt": prompt, "max_tokens": tokens, "stream": stream, "temperature": 1, "seed": seed});
        let mut connection = server.begin_post("/v1/completions", &body);
        match random.below(4) {
            // goes away, at once or after the first words
            0 => {
                if random.below(2) == 0 {
                    let _ = connection.read(&mut [0; 64]);
                }
                drop(connection);
                counts[2] += 1;
                continue;
            }
            // reads slowly
            1 => std::thread::sleep(Duration::from_millis(random.below(200))),
            // says nonsense in between
            2 => assert_eq!(server.post("/v1/completions", &json!({"prompt": {}})).status, 400),
            _ => {}
        }
        let answer = Answer::read(connection);
        match answer.status {
            200 if stream => assert_eq!(answer.events().last().unwrap(), "[DONE]"),
            200 => assert!(answer.json()["usage"]["completion_tokens"].as_u64().unwrap() <= tokens),
            429 => {
                counts[1] += 1;
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            _ => panic!("{answer:?}"),
        }
        counts[0] += 1;
    }
    counts
}

/// In kilobytes.
#[cfg(target_os = "linux")]
fn memory(server: &Server) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn sixty_four_clients() {
    let server = Server::language(&["--concurrent", "8", "--waiting", "40", "--cache", "20"]);
    let round = |seed: u64| {
        let counts: Vec<Counts> = std::thread::scope(|scope| {
            let server = &server;
            let clients: Vec<_> = (0..64).map(|i| scope.spawn(move || client(server, seed * 1000 + i, 5))).collect();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        counts.iter().fold([0; 3], |all: Counts, one| [all[0] + one[0], all[1] + one[1], all[2] + one[2]])
    };
    let since = Instant::now();
    let (mut counts, mut memories) = ([0; 3], Vec::new());
    for seed in 0..3 {
        let new = round(seed);
        (0..3).for_each(|i| counts[i] += new[i]);
        server.wait_for("hymba_sequences_writing", 0.0);
        server.wait_for("hymba_sequences_waiting", 0.0);
        memories.push(memory(&server));
    }
    let metrics = server.metrics();
    println!("served, refused, left: {counts:?} in {:?}; memory {memories:?} kB", since.elapsed());
    assert_eq!(counts.iter().sum::<u64>(), 3 * 64 * 5);
    assert!(counts.iter().all(|&count| count > 0), "{counts:?}");
    // none is lost: each ends in one way, and those that were read to the end ended well
    let ended = |end: &str| metrics[&format!("hymba_sequences_ended_total{{end=\"{end}\"}}")];
    let all = ["stop", "length", "cancelled", "timeout", "failed"].map(ended);
    assert_eq!(all.iter().sum::<f64>(), metrics["hymba_sequences_accepted_total"]);
    assert!(all[0] + all[1] >= counts[0] as f64 && all[2] <= counts[2] as f64 && all[3..] == [0.0, 0.0], "{all:?}");
    assert_eq!(metrics["hymba_sequence_seconds_count"], all[0] + all[1]);
    let status =
        |status: u16| metrics.get(&format!("hymba_responses_total{{path=\"/v1/completions\",status=\"{status}\"}}"));
    assert!(*status(200).unwrap() >= counts[0] as f64 && *status(429).unwrap() >= counts[1] as f64);
    assert_eq!(status(500), None);
    assert!(metrics["hymba_cache_bytes"] <= 20e6);
    // flat: what the last round adds is little
    assert!(memories[2] < 1.1 * memories[1] + 8000.0, "{memories:?}");
}
