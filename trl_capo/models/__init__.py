"""Where models are, how they are asked, and adapters merged into them."""
