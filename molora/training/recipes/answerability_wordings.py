"""What synthetic contexts say of people, towns and machines, what is asked about it, and in which words.

Facts and questions have `{name}` and `{value}` in their place; a name is of one split alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molora.training.recipes.choices import Choices


@dataclass(frozen=True)
class Attribute:
    """Something that may be known of each entity of a kind."""

    facts: Choices[str]
    questions: Choices[str]
    values: Sequence[str]


@dataclass(frozen=True)
class Kind:
    """Entities of a kind."""

    names: Choices[str]
    attributes: Mapping[str, Attribute]


def _words(text: str, before: str = "{}") -> tuple[str, ...]:
    return tuple(before.format(word) for word in text.split())


def _numbers(first: int, last: int, step: int) -> list[str]:
    return [f"{number:,}" if number >= 10_000 else str(number) for number in range(first, last, step)]


_TOWNS = ("Aldmoor", "Brenwick", "Carsten Bay", "Dunlow", "Eastmere", "Fennick", "Garrowby", "Hollin", "Ivering")
_COLOURS = ("red", "green", "grey", "yellow", "blue", "white", "black", "orange")

PERSON = Kind(
    names=Choices(
        _words(
            "Ava Ben Clara David Elena Felix Grace Henry Irene Jonas Kira Liam Maria Noah Olga Paul Quinn Rosa Simon "
            "Tara Umar Vera Walter Xenia Yusuf Zoe Anton Bianca Carlos Dora"
        ),
        _words("Alma Bruno Celia Dmitri Esther Farid Greta Hugo Ines Jakob Katya Leon Mina Nils Oda"),
    ),
    attributes={
        "job": Attribute(
            Choices(
                ("{name} works as {value}.", "{name} is {value}.", "By trade {name} is {value}."),
                ("{name} earns a living as {value}.", "For years {name} has been {value}."),
            ),
            Choices(
                ("What does {name} do for a living?", "What is {name}'s job?", "What does {name} work as?"),
                ("Which trade does {name} follow?", "How does {name} earn a living?"),
            ),
            _words("baker nurse carpenter teacher pilot gardener plumber lawyer tailor", "a {}"),
        ),
        "town": Attribute(
            Choices(
                ("{name} lives in {value}.", "{name} has a flat in {value}.", "{name}'s home is in {value}."),
                ("{name} moved to {value} for good.", "{value} is where {name} lives."),
            ),
            Choices(
                ("Where does {name} live?", "In which town does {name} live?", "Which town is {name}'s home in?"),
                ("What is the name of the town where {name} lives?", "Where is {name} at home?"),
            ),
            _TOWNS,
        ),
        "age": Attribute(
            Choices(
                ("{name} is {value} years old.", "{name} turned {value} this year.", "{name}'s age is {value}."),
                ("{name} has just celebrated birthday number {value}.",),
            ),
            Choices(
                ("How old is {name}?", "What is {name}'s age?", "What age is {name}?"),
                ("How many years old is {name}?", "Which birthday was {name}'s last?"),
            ),
            _numbers(18, 90, 1),
        ),
        "pet": Attribute(
            Choices(
                ("{name} keeps {value}.", "{name} has {value} at home.", "{name} owns {value}."),
                ("{value} shares the house with {name}.",),
            ),
            Choices(
                ("What pet does {name} have?", "Which animal does {name} keep?", "What kind of pet is {name}'s?"),
                ("What animal lives with {name}?",),
            ),
            ("a cat", "a parrot", "a tortoise", "a rabbit", "a terrier", "a canary", "a goldfish"),
        ),
        "instrument": Attribute(
            Choices(
                ("{name} plays the {value}.", "{name} is learning the {value}.", "{name} practises the {value} daily."),
                ("In the evenings one hears {name} on the {value}.",),
            ),
            Choices(
                ("What instrument does {name} play?", "Which instrument does {name} practise?"),
                ("On which instrument can one hear {name}?",),
            ),
            _words("piano cello flute harp violin trumpet guitar organ"),
        ),
        "colleague": Attribute(
            Choices(
                ("{name} shares an office with {value}.", "{name} works together with {value}."),
                ("{name} and {value} sit at neighbouring desks.",),
            ),
            Choices(
                ("Who does {name} share an office with?", "Who works together with {name}?"),
                ("Who sits at the desk beside {name}'s?",),
            ),
            ("Mr Oakes", "Ms Tran", "Mrs Bell", "Mr Silva", "Ms Novak", "Mr Haddad"),
        ),
    },
)

TOWN = Kind(
    names=Choices(
        _words(
            "Ashford Birkdale Corran Denholm Elsworth Farleigh Glenrock Harwick Inverbay Kettleby Langport Millhaven "
            "Norbury Oakham Pelstead Ravensey Stowbridge Thornby Upwell Wexcombe"
        ),
        _words("Amberley Blackmere Crowhurst Dalby Ellerton Fairwater Greyport Heston Ilmarsh Marlow"),
    ),
    attributes={
        "people": Attribute(
            Choices(
                (
                    "{name} has {value} inhabitants.",
                    "{value} people live in {name}.",
                    "The population of {name} is {value}.",
                ),
                ("At the last census {name} counted {value} residents.",),
            ),
            Choices(
                (
                    "How many people live in {name}?",
                    "What is the population of {name}?",
                    "How many inhabitants has {name}?",
                ),
                ("How many residents does {name} have?",),
            ),
            _numbers(1200, 60_000, 700),
        ),
        "river": Attribute(
            Choices(
                (
                    "{name} lies on the river {value}.",
                    "The {value} flows through {name}.",
                    "{name} was built on the {value}.",
                ),
                ("In {name} one crosses the {value} by an old bridge.",),
            ),
            Choices(
                ("Which river flows through {name}?", "On which river does {name} lie?"),
                ("What is the river at {name} called?",),
            ),
            ("Arle", "Brun", "Colne", "Dove", "Esk", "Fal", "Gade", "Isen"),
        ),
        "market": Attribute(
            Choices(
                ("The market in {name} is on {value}.", "{name} holds its market every {value}."),
                ("Stalls are put up in {name} each {value}.",),
            ),
            Choices(
                ("On which day is the market in {name}?", "When does {name} hold its market?"),
                ("Which is market day in {name}?",),
            ),
            ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
        ),
        "founded": Attribute(
            Choices(
                ("{name} was founded in {value}.", "The year in which {name} was founded is {value}."),
                ("{name} dates back to {value}.",),
            ),
            Choices(
                ("When was {name} founded?", "In which year was {name} founded?"),
                ("Which year does {name} date back to?",),
            ),
            [str(year) for year in range(1050, 1900, 13)],
        ),
        "mayor": Attribute(
            Choices(
                ("The mayor of {name} is {value}.", "{value} is mayor of {name}."),
                ("{value} was elected to govern {name}.",),
            ),
            Choices(
                ("Who is the mayor of {name}?", "What is the name of {name}'s mayor?"),
                ("Who governs {name}?",),
            ),
            ("Edith Hale", "Omar Reyes", "Lucy Brandt", "Peter Quist", "Nadia Fox", "Ivo Kern"),
        ),
        "product": Attribute(
            Choices(
                ("{name} is known for its {value}.", "Everybody buys {value} in {name}."),
                ("The {value} of {name} has won prizes.",),
            ),
            Choices(
                ("What is {name} known for?", "What does everybody buy in {name}?"),
                ("What of {name} has won prizes?",),
            ),
            ("cheese", "pottery", "honey", "glass", "cider", "lace", "bread"),
        ),
    },
)

MACHINE = Kind(
    names=Choices(
        _words(
            "Arvo Brisk Corvid Delta Ember Falcon Gamma Helix Ionic Jolt Krait Lumen Matrix Nimbus Orbit Pulse",
            "the {}",
        ),
        _words("Quartz Raptor Sirocco Tempo Umbra Vortex Wasp Zephyr", "the {}"),
    ),
    attributes={
        "price": Attribute(
            Choices(
                ("The price of {name} is {value} dollars.", "A buyer pays {value} dollars for {name}."),
                ("In the shops one finds {name} for {value} dollars.",),
            ),
            Choices(
                ("What does {name} cost?", "What is the price of {name}?"),
                ("How much must one pay for {name}?",),
            ),
            _numbers(40, 2000, 15),
        ),
        "weight": Attribute(
            Choices(
                ("The weight of {name} is {value} kilograms.", "On the scales {name} shows {value} kilograms."),
                ("To lift {name} is to lift {value} kilograms.",),
            ),
            Choices(
                ("How heavy is {name}?", "What is the weight of {name}?"),
                ("How many kilograms has {name}?",),
            ),
            _numbers(2, 95, 1),
        ),
        "colour": Attribute(
            Choices(
                ("The case of {name} is {value}.", "Its maker paints {name} {value}."),
                ("One knows {name} by its {value} case.",),
            ),
            Choices(
                ("What colour is {name}?", "Which colour does the case of {name} have?"),
                ("In which colour is {name} painted?",),
            ),
            _COLOURS,
        ),
        "maker": Attribute(
            Choices(
                ("The company {value} makes {name}.", "The maker of {name} is {value}."),
                ("On the label of {name} stands the name {value}.",),
            ),
            Choices(
                ("Who makes {name}?", "Which company is the maker of {name}?"),
                ("Which firm does {name} come from?",),
            ),
            ("Hartmann", "Olsen", "Takeda", "Brightwell", "Ferrante", "Kovac"),
        ),
        "battery": Attribute(
            Choices(
                ("The battery of {name} lasts {value} hours.", "Once charged, {name} runs for {value} hours."),
                ("After {value} hours {name} must be charged again.",),
            ),
            Choices(
                ("How long does the battery of {name} last?", "For how many hours does {name} run?"),
                ("After how many hours must {name} be charged?",),
            ),
            _numbers(3, 40, 1),
        ),
        "year": Attribute(
            Choices(
                ("It was in {value} that {name} came out.", "The first year of {name} was {value}."),
                ("Shops have had {name} since {value}.",),
            ),
            Choices(
                ("When did {name} come out?", "In which year did {name} come out?"),
                ("Since when have shops had {name}?",),
            ),
            [str(year) for year in range(1985, 2025)],
        ),
    },
)

KINDS = {"person": PERSON, "town": TOWN, "machine": MACHINE}

FORMS = Choices(
    (
        "{text}\n\n{question}",
        "Read this.\n\n{text}\n\nQuestion: {question}",
        "Text: {text}\nQuestion: {question}",
        "{question}\n\n{text}",
        "Here is a note: {text}\n\nPlease tell me: {question}",
    ),
    (
        "Context:\n{text}\n\nAnswer from the context: {question}",
        "From my notes: {text} Now, {question}",
        '"{text}"\n{question}',
    ),
)
"""One message; a conversation of two turns has a form of `TURNS` instead."""

TURNS = Choices(
    (
        ("Please read this first.\n\n{text}", "I have read it. What would you like to know?"),
        ("{text}", "Thank you. What is your question?"),
    ),
    (("I will ask about the following.\n{text}", "Go ahead."),),
)
"""The user's text and what the assistant says to it, before the question."""
