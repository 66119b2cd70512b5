"""Translation validation: what was proven of a mask is held against what the model computes."""

from mpass.validation.validate import ValidationError, ValidationWarning, validate_sites

__all__ = ["ValidationError", "ValidationWarning", "validate_sites"]
