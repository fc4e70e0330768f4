"""Ray's side: the only room that imports ray."""
