"""What a model file of any format holds and computes, read without the runtime that would run it."""
