"""experiments/check_decode_state.py on a few steps."""


def test_each_form_of_the_state_has_its_errors(command):
    options = ["--steps", 100, 200, "--batch", 1, "--heads", 1, "--key-dim", 8]
    _, output, _ = command("check_decode_state.py", *options)
    header, *lines = output.splitlines()
    assert header.split("  ")[-1].strip() == "outputs 200"
    rows = {tuple(line[:12].split() + line.split()[-5:-4]): line.split()[-4:] for line in lines}
    assert len(rows) == len(lines) == 15
    for (*inputs, form), cells in rows.items():
        error = float(cells[1])
        assert error < 1e-4 if form == "float32" else 1e-3 < error, (inputs, form)
    # Where a state only decays, too slowly for its nearest neighbour, it stays as it was.
    assert float(rows["decayed", "only", "nearest"][1]) > 0.15
    assert float(rows["decayed", "only", "stochastic"][1]) < 0.1
