"""The needles of task niah: statements that end in a number, each with the question that asks for it.

They differ in what they are about, so that a question points at one of them by more than a single word.
"""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """A statement up to its number, and the question for that number."""

    statement: str
    question: str


FACTS = (
    Fact("The steam engine in the museum carries the serial number", "What is the serial number of the steam engine?"),
    Fact("The bakery at the corner has the telephone number", "What is the telephone number of the bakery?"),
    Fact("The safe behind the painting opens with the code", "Which code opens the safe behind the painting?"),
    Fact("The winning ticket of the raffle had the number", "Which number did the winning ticket have?"),
    Fact("The oldest tree in the park bears the tag number", "Which tag number does the oldest tree bear?"),
    Fact("The parcel from the clockmaker has the tracking number", "What is the tracking number of the parcel?"),
    Fact("The violin in the glass case has the catalogue number", "What is the catalogue number of the violin?"),
    Fact("The beekeepers' club has the account number", "What is the account number of the beekeepers' club?"),
    Fact("The balloon over the harbour flew under the licence number", "What was the licence number of the balloon?"),
    Fact("The stage door of the theatre is unlocked with the digits", "Which digits unlock the stage door?"),
    Fact("The lost suitcase at the station got the claim number", "Which claim number did the lost suitcase get?"),
    Fact("The lighthouse on the cape answers to the radio call", "To which radio call does the lighthouse answer?"),
)
