"""The commands of `rftcore`: a module for what each does, and one for its options, which `--help` reads without torch."""
