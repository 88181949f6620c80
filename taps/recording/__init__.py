"""Recording the target: prompts in, its answers and features kept. Training and evaluation read both."""
