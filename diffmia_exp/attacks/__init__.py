"""One file per attack, named as in its paper; `base.Attack` is what they share."""
