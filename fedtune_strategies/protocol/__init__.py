"""The messages of every method.

`records` puts a kind and its bytes into a Flower record and takes them out again (imports Flower, no torch);
`messages` holds the typed messages and turns them into bytes and back (imports torch, no Flower);
`mail` does both at once.
"""
