"""CAPO's rivals on the same seam: one small module each, with its formula, its options and its trainer."""
