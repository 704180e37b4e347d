"""Train several methods and seeds from one base, and compare them."""
