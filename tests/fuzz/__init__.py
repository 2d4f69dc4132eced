"""Random and mutated input for every reader of the project. `make fuzz` plays
all of it, `make test` the corpus and a few cases of each surface."""
