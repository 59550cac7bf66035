from hypothesis import given
from hypothesis import strategies as st

from molora.serving.notes import Notes

ENDS = st.none() | st.integers(-25, 25)


@given(num_blocks=st.integers(0, 4), size=st.integers(1, 4), num_others=st.integers(0, 5), first=ENDS, end=ENDS)
def test_they_are_cut_as_a_list_is(num_blocks: int, size: int, num_others: int, first: int, end: int) -> None:
    whole = [f"note on {token}" for token in range(num_blocks * size + num_others)]
    notes = Notes([tuple(whole[index * size : (index + 1) * size]) for index in range(num_blocks)])
    for note in whole[num_blocks * size :]:
        notes += [note]
    assert len(notes) == len(whole)
    assert not whole or notes.last == whole[-1]
    assert notes[first:end] == whole[first:end]
