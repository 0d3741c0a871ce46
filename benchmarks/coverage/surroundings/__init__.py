"""What diffusers' tests find around them where they are developed, made here: small models of the hub, libraries."""
