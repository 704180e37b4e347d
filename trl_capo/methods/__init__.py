"""CAPO and its rivals: one small file a method, with its formula, its options and its trainer."""
