"""Which inputs are traced, and how good the answers are, beside what chance gives."""
