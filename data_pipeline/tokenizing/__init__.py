"""Documents to token ids, by the fastest library whose ids equal the reference's."""
