"""The nouns: forms, records, checks, expansion."""
