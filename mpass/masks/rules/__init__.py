"""One rule per op: the element of its result from the elements of its operands."""
