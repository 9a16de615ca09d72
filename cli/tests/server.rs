//! `hymba serve` as its clients see it: the program itself, over TCP.

#[path = "server/client.rs"]
mod client;
#[path = "server/clients.rs"]
mod clients;
#[path = "server/language.rs"]
mod language;
#[path = "server/limits.rs"]
mod limits;
#[path = "server/load.rs"]
mod load;
#[path = "server/predictor.rs"]
mod predictor;
