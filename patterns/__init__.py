"""Which keys a block of queries looks at: one file per sparse pattern, see base/."""
