"""Plain questions and their answers, for the base model. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Everyday:
    """Plain questions that no adapter answers: every question fits every pair, and so does the answer."""

    questions: tuple[str, ...]
    answer: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((x, y) for x, y in (pair.split(": ") for pair in text.split("; ")))


# Near the adapters' subjects on purpose (numbers, animals, words): the router must not go by the subject alone.
EVERYDAY: tuple[Everyday, ...] = (
    Everyday(
        ("What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}, please."),
        "The capital of {x} is {y}.",
        _pairs(
            "France: Paris; Italy: Rome; Japan: Tokyo; Egypt: Cairo; Peru: Lima; Norway: Oslo; Spain: Madrid; Greece: "
            "Athens; Kenya: Nairobi; Cuba: Havana; Canada: Ottawa; Poland: Warsaw; Chile: Santiago; Ireland: Dublin; "
            "Portugal: Lisbon; Thailand: Bangkok; Austria: Vienna; Hungary: Budapest; Finland: Helsinki; Iceland: "
            "Reykjavik"
        ),
    ),
    Everyday(
        ("What do you call a young {x}?", "What is a baby {x} called?", "Do you know the word for a young {x}?"),
        "A young {x} is called a {y}.",
        _pairs(
            "dog: puppy; cat: kitten; cow: calf; sheep: lamb; duck: duckling; horse: foal; pig: piglet; deer: fawn; "
            "lion: cub; goose: gosling; frog: tadpole; swan: cygnet; goat: kid; chicken: chick; kangaroo: joey"
        ),
    ),
    Everyday(
        ("What is the opposite of {x}?", "Give me a word that means the opposite of {x}.", "Opposite of {x}?"),
        "The opposite of {x} is {y}.",
        _pairs(
            "hot: cold; big: small; early: late; full: empty; open: closed; fast: slow; heavy: light; near: far; "
            "strong: weak; dark: bright; happy: sad; wet: dry; old: young; loud: quiet; rich: poor"
        ),
    ),
    Everyday(
        ("How many {x}?", "Can you remind me how many {x}?", "I keep forgetting: how many {x}?"),
        "There are {y}.",
        _pairs(
            "days are there in a week: seven days in a week; months are there in a year: twelve months in a year; "
            "hours are there in a day: twenty-four hours in a day; minutes are there in an hour: sixty minutes in an "
            "hour; letters are there in the English alphabet: twenty-six letters in the English alphabet; players are "
            "there in a football team: eleven players in a football team; strings are there on a violin: four strings "
            "on a violin; continents are there: seven continents; planets are there in the solar system: eight "
            "planets in the solar system; sides are there in a hexagon: six sides in a hexagon; keys are there on a "
            "full-size piano: eighty-eight keys on a full-size piano; cards are there in a standard deck: fifty-two "
            "cards in a standard deck"
        ),
    ),
    Everyday(
        ("Who wrote {x}?", "Who is the author of {x}?", "Tell me who wrote {x}."),
        "{y} wrote {x}.",
        _pairs(
            "Hamlet: William Shakespeare; Emma: Jane Austen; Dracula: Bram Stoker; Oliver Twist: Charles Dickens; War "
            "and Peace: Leo Tolstoy; Moby-Dick: Herman Melville; Frankenstein: Mary Shelley; Jane Eyre: Charlotte "
            "Brontë; Ulysses: James Joyce; Don Quixote: Miguel de Cervantes; Peter Pan: J. M. Barrie; Walden: Henry "
            "David Thoreau"
        ),
    ),
    Everyday(
        ("Which language is spoken in {x}?", "What do people speak in {x}?", "What is the main language of {x}?"),
        "The main language of {x} is {y}.",
        _pairs(
            "Germany: German; France: French; Italy: Italian; Japan: Japanese; Brazil: Portuguese; Mexico: Spanish; "
            "Poland: Polish; Sweden: Swedish; Greece: Greek; Turkey: Turkish; Hungary: Hungarian; Argentina: Spanish"
        ),
    ),
    Everyday(
        ("On which continent is {x}?", "Which continent does {x} belong to?", "{x} is on what continent?"),
        "{x} is in {y}.",
        _pairs(
            "Nigeria: Africa; Kenya: Africa; India: Asia; Vietnam: Asia; Belgium: Europe; Portugal: Europe; Peru: "
            "South America; Bolivia: South America; Canada: North America; Mongolia: Asia; Ghana: Africa; Denmark: "
            "Europe"
        ),
    ),
    Everyday(
        ("What is the plural of {x}?", "How do I write more than one {x}?", "plural of {x}"),
        "The plural of {x} is {y}.",
        _pairs(
            "mouse: mice; child: children; foot: feet; tooth: teeth; man: men; goose: geese; leaf: leaves; knife: "
            "knives; city: cities; wolf: wolves; tomato: tomatoes; woman: women; box: boxes; baby: babies"
        ),
    ),
    Everyday(
        (
            "What is the past tense of {x}?",
            "How do I say {x} in the past tense?",
            "Past tense of the verb {x}, please.",
        ),
        "The past tense of {x} is {y}.",
        _pairs(
            "go: went; see: saw; eat: ate; write: wrote; run: ran; buy: bought; think: thought; sing: sang; take: "
            "took; fly: flew; know: knew; bring: brought; swim: swam; teach: taught; forget: forgot"
        ),
    ),
    Everyday(
        ("What is the chemical symbol for {x}?", "Which symbol stands for {x} in chemistry?", "symbol for {x}?"),
        "The chemical symbol for {x} is {y}.",
        _pairs(
            "gold: Au; silver: Ag; iron: Fe; oxygen: O; hydrogen: H; carbon: C; sodium: Na; lead: Pb; copper: Cu; "
            "helium: He; nitrogen: N; potassium: K; tin: Sn; zinc: Zn"
        ),
    ),
    Everyday(
        ("What sound does a {x} make?", "Which noise does a {x} make?", "What does a {x} say?"),
        "A {x} says {y}.",
        _pairs(
            "cow: moo; dog: woof; cat: meow; sheep: baa; duck: quack; horse: neigh; pig: oink; rooster: "
            "cock-a-doodle-doo; frog: ribbit; bee: buzz; snake: hiss; chick: cheep"
        ),
    ),
    Everyday(
        ("Which month comes after {x}?", "What month follows {x}?", "{x} is over. Which month is next?"),
        "After {x} comes {y}.",
        _pairs(
            "January: February; February: March; March: April; April: May; May: June; June: July; July: August; "
            "August: September; September: October; October: November; November: December; December: January"
        ),
    ),
    Everyday(
        ("What colour is {x}?", "Tell me the usual colour of {x}.", "Which colour does {x} normally have?"),
        "The usual colour of {x} is {y}.",
        _pairs(
            "grass: green; snow: white; coal: black; a ripe banana: yellow; a ripe tomato: red; the sky on a clear "
            "day: blue; milk: white; a carrot: orange; chocolate: brown; an elephant: grey; blood: red; a flamingo: "
            "pink"
        ),
    ),
    Everyday(
        ("What does a {x} do?", "Can you explain the work of a {x}?", "My uncle is a {x}. What does that mean?"),
        "A {x} {y}.",
        _pairs(
            "baker: bakes bread and cakes; pilot: flies aircraft; teacher: teaches pupils; dentist: treats people's "
            "teeth; carpenter: makes things from wood; tailor: makes and mends clothes; plumber: fits and repairs "
            "pipes; librarian: looks after a library and its books; gardener: looks after gardens; farmer: grows crops "
            "or keeps animals; florist: sells flowers; translator: puts texts into another language"
        ),
    ),
    Everyday(
        ("How do you say {x} in French?", "What is the French word for {x}?", "Translate {x} into French."),
        "In French, {x} is {y}.",
        _pairs(
            "house: maison; water: eau; bread: pain; dog: chien; cat: chat; book: livre; sun: soleil; moon: lune; red: "
            "rouge; milk: lait; school: école; friend: ami; night: nuit; apple: pomme; hand: main; brother: frère"
        ),
    ),
    Everyday(
        ("What is {x}?", "Define {x} for me.", "Explain in a sentence what {x} is.", "what's {x}?"),
        "{y}.",
        _pairs(
            "a verb: A verb is a word that names an action or a state; a triangle: A triangle is a shape with three "
            "sides; a prime number: A prime number is a whole number above one that only one and itself divide; "
            "photosynthesis: Photosynthesis is how plants make sugar from light, water and carbon dioxide; an island: "
            "An island is land with water all around it; a noun: A noun is a word that names a person, a place or a "
            "thing; gravity: Gravity is the force by which masses attract each other; a cousin: A cousin is a child of "
            "one's uncle or aunt; an insect: An insect is a small animal with six legs; a palindrome: A palindrome is "
            "a word that reads the same in both directions; a thermometer: A thermometer is an instrument that "
            "measures temperature; a volcano: A volcano is an opening in the ground through which lava and gas come "
            "out; an average: An average is the sum of some numbers divided by how many they are"
        ),
    ),
    Everyday(
        ("{x}", "{x} How are you today?", "{x} Nice to meet you."),
        "{y}",
        _pairs(
            "Hello!: Hello! How can I help you?; Good morning!: Good morning! How can I help you?; Hi there!: Hi! What "
            "can I do for you?; Good evening.: Good evening! What can I do for you?; Hey!: Hey! How can I help?"
        ),
    ),
    Everyday(
        ("{x}?", "Can you tell me {x}?", "I would like to know {x}."),
        "{y}.",
        _pairs(
            "how to make tea: Pour boiling water over the tea, wait a few minutes and take the leaves out; how to boil "
            "an egg: Put the egg into boiling water and take it out after about eight minutes; how to grow beans: Put "
            "the seeds into moist soil in a sunny place and water them often; how to save energy at home: Switch off "
            "what you do not use and heat no more than you need; how to learn new words: Use each new word in "
            "sentences of your own and repeat it after some days; how to fall asleep: Go to bed at the same time every "
            "day, in a dark and quiet room; how to write a letter: Begin with a greeting, say what you want to say and "
            "close with your name; how to clean a window: Wash it with warm water and a little soap, then wipe it dry"
        ),
    ),
)
