"""The messages of every method.

`door` checks what comes from outside;
`records` puts a kind and its bytes into a Flower record and takes them out again (imports Flower, no torch);
`messages` holds the typed messages and turns them into bytes and back (imports torch, no Flower);
`flower` does both at once.
"""
