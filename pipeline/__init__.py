"""The machine: it knows that stages exist, not what they do, and never imports torch.

Seven concepts, and no more:

stage           a frozen pydantic model whose fields are its configuration and whose `run` does the work
input           a field written `stage:NAME`, `hub:ORG/NAME[@REV]` or `file:PATH`: an edge of the graph
key             sha256 of stage type, version, non-default configuration and the digests of the inputs
work directory  `work/KEY/{out,scratch}`; survives a failure, so running again resumes
lock            kernel locks on `locks/KEY`: one writer, nothing to clean up after a crash
artifact        an immutable directory and its `artifact.json`, published by one rename
manifest        stage name -> artifact, for one pipeline: a view that the next run can rebuild
"""
