"""The conversation with the agent of a board: frames, replies, sessions, and the transports that carry them."""
