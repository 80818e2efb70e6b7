"""Who trains what when: the state of a run, its state machine, and both sides of its protocol."""
