"""From raw to cleaned documents, with datatrove."""
