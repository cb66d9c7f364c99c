"""From a base model to one that answers: conversations, the chat template, and TRL's trainer."""
