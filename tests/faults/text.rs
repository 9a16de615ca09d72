//! Text, where prompt and answer meet, and templates.
