//! The encoder: numbers, memory, threads, platforms.
