"""Models and texts to run the pass on: real ones of this machine, and tiny random ones."""
