"""Pure types and names shared by every room: no input or output happens here."""
