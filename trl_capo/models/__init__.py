"""Find models, build their prompts, and merge adapters into them."""
