"""What the compiler made of a model: explanations, profiles, pages and pictures."""
