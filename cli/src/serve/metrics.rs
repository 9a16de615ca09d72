//! The text of `/metrics`, in the format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper limits of the buckets, in seconds.
const BUCKETS: [f64; 10] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

#[derive(Default)]
pub struct Metrics {
    /// By path and status.
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    pub accepted: Counter,
    pub ended: [Counter; ENDS.len()],
    pub waiting: Counter,
    pub reading: Counter,
    pub writing: Counter,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub generated_tokens: Counter,
    pub steps: Counter,
    pub rows: Counter,
    pub cache_bytes: Counter,
    pub cache_entries: Counter,
    pub streams: Counter,
    pub series: Counter,
    pub frames: Counter,
    pub first_token: Histogram,
    pub whole: Histogram,
}

/// How a sequence ends. Each accepted one ends in exactly one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Stop,
    Length,
    Cancelled,
    Timeout,
    Failed,
}

/// In the order of [`End`].
const ENDS: [&str; 5] = ["stop", "length", "cancelled", "timeout", "failed"];

#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub fn subtract(&self, count: usize) {
        self.0.fetch_sub(count as u64, Ordering::Relaxed);
    }

    pub fn set(&self, value: usize) {
        self.0.store(value as u64, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
pub struct Histogram {
    buckets: [Counter; BUCKETS.len()],
    count: Counter,
    micros: Counter,
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        for (bucket, limit) in self.buckets.iter().zip(BUCKETS) {
            bucket.add(usize::from(time.as_secs_f64() <= limit));
        }
        self.micros.add(time.as_micros() as usize);
        self.count.add(1);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bucket, limit) in self.buckets.iter().zip(BUCKETS) {
            let _ = writeln!(out, "{name}_bucket{{le=\"{limit}\"}} {}", bucket.get());
        }
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {}", self.count.get());
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {}", self.micros.get() as f64 / 1e6, self.count.get());
    }
}

impl Metrics {
    pub fn response(&self, path: &'static str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *responses.entry((path, status)).or_default() += 1;
    }

    pub fn end(&self, end: End) {
        self.ended[end as usize].add(1);
    }

    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut one = |name: &str, kind: &str, help: &str, values: &[(String, u64)]| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let responses = self.responses.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let responses: Vec<_> = responses
            .iter()
            .map(|((path, status), count)| (format!("{{path=\"{path}\",status=\"{status}\"}}"), *count))
            .collect();
        one("hymba_responses_total", "counter", "HTTP responses begun.", &responses);
        let ended = ENDS.iter().zip(&self.ended);
        let ended: Vec<_> = ended.map(|(name, count)| (format!("{{end=\"{name}\"}}"), count.get())).collect();
        one("hymba_sequences_ended_total", "counter", "Sequences by how they ended.", &ended);
        for (name, kind, help, counter) in [
            ("hymba_sequences_accepted_total", "counter", "Sequences asked for and taken on.", &self.accepted),
            ("hymba_sequences_waiting", "gauge", "Sequences that wait for a row.", &self.waiting),
            ("hymba_sequences_reading", "gauge", "Sequences whose prompt is being read.", &self.reading),
            ("hymba_sequences_writing", "gauge", "Sequences being generated.", &self.writing),
            ("hymba_prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.", &self.prompt_tokens),
            ("hymba_cached_tokens_total", "counter", "Tokens of prompts found in the cache.", &self.cached_tokens),
            ("hymba_generated_tokens_total", "counter", "Tokens generated.", &self.generated_tokens),
            ("hymba_steps_total", "counter", "Passes through the model.", &self.steps),
            ("hymba_step_rows_total", "counter", "Rows in these passes.", &self.rows),
            ("hymba_cache_bytes", "gauge", "Bytes of cached states.", &self.cache_bytes),
            ("hymba_cache_entries", "gauge", "Cached states.", &self.cache_entries),
            ("hymba_streams", "gauge", "Open streams of frames.", &self.streams),
            ("hymba_series_total", "counter", "Series predicted.", &self.series),
            ("hymba_frames_total", "counter", "Frames of streams.", &self.frames),
        ] {
            one(name, kind, help, &[(String::new(), counter.get())]);
        }
        self.first_token.write(&mut out, "hymba_first_token_seconds", "From acceptance to the first token.");
        self.whole.write(&mut out, "hymba_sequence_seconds", "From acceptance to the end.");
        out
    }
}
