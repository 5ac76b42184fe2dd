"""Training code of other people's making, with rftcore's sampler in it; docs/drop_in.md goes through each."""
