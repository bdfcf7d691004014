"""What tests of the command line share."""


def fails(result: tuple[int, str, str], *words: str) -> None:
    """The mistake is said in one line on stderr with all `words`, nothing is on stdout, and the code is 2."""
    code, out, err = result
    line = err.splitlines()[-1]
    assert code == 2 and out == "" and err.count("\n") == 1, err
    for word in words:
        assert word in line, err
