//! Generation: states, stops, seeds.
