"""More wordings for the held-out files alone. Their author had seen the tasks and their facts, and no other wording.

Plain data, which `wordings` and `more_wordings` take up; what came too close to a wording of training was left out.
"""

HELD_OUT_WORDINGS: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        "I can't find my calculator anywhere, so tell me: how much is {spoken}?",
        "Starting at {first}, {steps}. Which number do you end up with?",
        "{expression} comes to what number?",
        (
            "My daughter's homework says to begin with {first}, then "
            "{steps}, and write down the final result. What should she write?"
        ),
        "Evaluate this: {expression}",
    ),
    "words": (
        'Please write the word "{word}" backwards, letter by letter.',
        "{word}: what is this word with its letters in the opposite order?",
        (
            "My little brother invented a secret code in which every "
            'word is written back to front. How would he write "{word}"?'
        ),
        'I need "{word}" with all its letters reversed for a puzzle I\'m making, can you give me that?',
    ),
    "family": (
        "Say what {a} is to {b}, given this: {story}",
        (
            "I was leafing through an old photo album. {story} When {b} "
            'points at {a} and says "That\'s my ...", which word comes next?'
        ),
        "{story} So {a} would be {b}'s what, exactly?",
        "Can you help me with this family? {story} I'd like to know which relative of {b} {a} is.",
        '{story} Complete the sentence with the right family word: "{a} is the ... of {b}".',
    ),
    "sorting": (
        "Could you put these numbers in order {direction}, please: {commas}",
        "{semicolons}. Arrange these in {order} order.",
        ("I wrote down everyone's scores in our card game: {prose}. List them again, sorted, with the {first} first."),
        "Reorder this list so that its values are {change}: {spaces}",
        "I've got the numbers {prose} and want them in {order} order. What does the sorted list look like?",
    ),
    "legs": (
        "How many legs would you count in total if you saw {prose}?",
        "Number of legs, all together, please: {commas}.",
        "A cobbler makes one shoe for every leg of these animals: {commas}. How many shoes does he make?",
        'The register of an animal park reads "{colons}". What is the total number of legs there?',
        "Please add up all the legs of {prose} and tell me the result.",
    ),
    "equations": (
        "What value of {variable} makes {starred} true?",
        "I'm thinking of a number, let's call it {variable}. I can tell you that {spoken}. What's my number?",
        "{equation}. What does {variable} have to be?",
        "I'm stuck on my algebra homework, can you find {variable} if {equation}?",
        "Determine the unknown {variable} from the following: {starred}",
    ),
    "clock": (
        "How much time passes between {start} and {end} on the same day, in hours and minutes?",
        (
            "My train leaves at {start} and gets in at {end} the "
            "same day. How many hours and minutes will I be travelling?"
        ),
        "{start} until {end}, same day. Express the duration in hours and minutes.",
        (
            "The lights went on at {start} and off again at {end} "
            "that day. Tell me in hours and minutes how long they were on."
        ),
        (
            "Please give the difference between the clock times "
            "{start} and {end}, both on one day, as hours and minutes."
        ),
        "It's {start} now and I have to wait until {end} today, so how many hours and minutes is that?",
    ),
    "filtering": (
        "From the list {brackets}, {do} the numbers {which}, without changing the order.",
        "Going through {spaces} from left to right, which numbers are {kept}?",
        "I have these numbers: {semicolons}. Please {do} the ones that are {which} and show me what is left.",
        "{commas}. If you {do} the numbers {which}, what does the list look like?",
        (
            "We're playing a game in which only numbers {kept} "
            "count. Out of {prose}, which ones count, in the order given?"
        ),
        "Copy out just the numbers that are {kept}, in their original order: {commas}",
    ),
    "tastes": (
        "Let me tell you about my neighbours. {story} Now, who was it again that {asked}?",
        "According to the following notes, who {asked}? {story}",
        "{story} Please give me the name of the one who {asked}.",
        ("I'm planning a party and asked around about everybody's likes and dislikes. {story} Who among them {asked}?"),
    ),
    "angles": (
        "I've measured {count} angles of a {shape}: {degrees}. How many degrees does the {last} one have?",
        "If {count} of a {shape}'s angles are {signs}, what is the {last}, in degrees?",
        "{degrees} are {count} of the angles in a {shape}. Work out the {last} angle in degrees.",
        "Find the missing angle of a {shape}, in degrees, when the other {count} are {prose} degrees.",
        (
            "A carpenter saws a board into a {shape}. At {count} corners she "
            "measures {signs}. What angle, in degrees, is at the {last} corner?"
        ),
        "Known angles of a {shape}, in degrees: {commas}. Wanted: the {last} angle, also in degrees.",
    ),
}
