"""What a run will hold and how long it will take, by arithmetic alone (docs/planning.md). Plain values in, plain values
out: it never sees a recipe, a weight or a GPU."""
