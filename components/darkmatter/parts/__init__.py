"""What several objectives are made of: heads, teachers, memories, masks, decoders. None of them knows a method's name."""
