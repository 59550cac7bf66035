"""More wordings for the held-out files alone, of authors who had seen the tasks and their facts, and no other wording.

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

# By later authors, who came when training had been changed by what was wrong of the others.
LATER_HELD_OUT_WORDINGS: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        (
            "My kid swears the calculator is broken when it comes to {expression}. Settle it for us: "
            "what should the display show?"
        ),
        "The till reads {first} when I open up. From there I {steps}. Where does that leave the till?",
        "{spoken}: could you crunch that for me real quick?",
        (
            'Someone scribbled "{expression} = ?" on the whiteboard in the break room and nobody has '
            "filled in the blank. Which number belongs there?"
        ),
        (
            "Imagine an elevator of numbers: you board at {first}, and your instructions are to {steps}. "
            "At which number do you get off?"
        ),
    ),
    "words": (
        "If the letters of {word} marched past me last one first, what would I end up reading?",
        'Start at the tail end of "{word}" and type it out letter by letter until you get to its beginning.',
        (
            "I'm making up names for a fantasy novel by spelling ordinary words from right to left. "
            "Which name do I get out of '{word}'?"
        ),
        (
            "Suppose a typewriter's carriage ran the wrong way and every letter of {word} landed in the "
            "opposite order. What would be on the paper?"
        ),
        "Would you mind flipping the spelling for me, end to start? The word in question: {word}",
    ),
    "family": (
        (
            'At the reunion I got everybody mixed up, although my cousin did explain it: "{story}" So '
            'when {b} introduces {a} to a friend, which word goes after "this is my"?'
        ),
        "Genealogy puzzle. {story} Relative to {b}, {a} is the what?",
        (
            "I need one label for my family tree poster: the one on the line that runs from {b} to {a}, "
            "saying what {a} is to {b}. Here is everything I know. {story}"
        ),
        (
            "{b} is drawing up a list of relatives and has reached {a}. Which kinship term should stand "
            "beside that name, given the following? {story}"
        ),
        "Notes from the parish register:\n{lines}\nJudging by these, {b} may call {a} their what?",
    ),
    "sorting": (
        "The raffle tickets {prose} got shuffled. Lay them out again {direction}, would you?",
        (
            "Queue up, numbers! The {first} goes to the front, the {last} to the very back, and the rest "
            "fall in between accordingly: {commas}"
        ),
        "{semicolons} <- tidy this up so the values are in {order} order",
        (
            "These raffle tickets got shuffled: {semicolons}. Lay them out again {direction}, and if a "
            "number turns up more than once, let it turn up just as often in your row."
        ),
        (
            "My playlist has these track lengths:\n{bullets}\nI'd like to hear them {direction}; in what "
            "sequence do they come?"
        ),
    ),
    "legs": (
        (
            "Our farm-sim save currently holds {commas}, and the feed screen wants a leg count for the "
            "whole lot; what number goes there?"
        ),
        "{plus}. Tally up the legs, please!",
        (
            "A ferryman is checking his manifest ({colons}) and wonders how many legs are standing on "
            "deck altogether. Can you help the poor man?"
        ),
        "If all the legs belonging to {prose} were lined up in a row, how long would the row be, counted in legs?",
        "Inventory of my little zoo below. I'm only after the grand total of legs.\n{lines}",
    ),
    "equations": (
        (
            "There's a smudge on my homework where the value of {variable} used to be. All that's "
            "legible is {equation}. What did the smudge cover?"
        ),
        '"{spoken}," mumbled the professor, and walked out without revealing {variable}. Reveal it for us.',
        (
            "I'm thinking of a secret number, let's name it {variable}. Whenever I {steps}, I wind up at "
            "{right}. Unmask it!"
        ),
        (
            "My tutor scribbled {starred} in the margin and left before telling me which number "
            "{variable} stands for, so which is it?"
        ),
        "Pin down {variable} for me, would you? The only clue I've been handed is this: {equation}",
    ),
    "clock": (
        (
            "The babysitter rang the bell at {start} and left at {end} that same day. For what stretch "
            "of time, in hours and minutes, do I owe her?"
        ),
        "{start} -> {end}, same day. Elapsed hours and minutes?",
        (
            "My parking ticket is stamped {start}, and the barrier let me out at {end} later that day. "
            "Kindly work out my stay in hours and minutes."
        ),
        (
            "By the time the bread came out of the oven it was {end}; I had begun kneading at {start} on "
            "the very same day. How many hours and minutes did the whole affair swallow up?"
        ),
        (
            "Say a stopwatch is set off when the clock strikes {start} and halted at {end}, with no "
            "midnight in between. What will it show in hours and minutes?"
        ),
    ),
    "filtering": (
        (
            "A bouncer with a strict door policy lets in only numbers {kept}. Waiting outside are "
            "{prose}. Who makes it in?"
        ),
        "Given {brackets}, {do} the entries that are {which} and show me what's left.",
        "x {sign} {limit} is my condition. Which x out of {semicolons} live up to it?",
        (
            "I've got too many house numbers on my delivery sheet, namely {commas}. My boss told me to "
            "{do} those {which}. How does the sheet read afterwards?"
        ),
        "Out of {prose}, I only have use for the numbers that are {kept}, so list those for me in the order they came.",
    ),
    "tastes": (
        (
            "I'm working on the seating plan and took some notes: {story} Remind me whose chair has to "
            'be marked with "{asked}"?'
        ),
        'I\'m putting together place cards and jotted this down: {story} Whose card should carry the note "{asked}"?',
        '"{story}" That\'s what the gossip column had to say this morning. And who was it again that {asked}?',
        (
            "A gift card came without a name, saying merely that the recipient {asked}. Going by what "
            "follows, to whom should I hand it? {story}"
        ),
        "Overheard at the office:\n{lines}\nHelp me out, which colleague {asked}?",
    ),
    "angles": (
        (
            "A carpenter is cutting a {shape} out of plywood and has already sawn corners of {degrees}. "
            "How many degrees remain for the {last} corner?"
        ),
        "{signs} are taken. What's the leftover angle of this {shape}?",
        (
            "The protractor snapped after I had measured {count} of my {shape}'s angles, getting {prose} "
            "degrees. Rescue me: what would it have said for the {last}?"
        ),
        (
            "One corner of my {shape} sketch got smudged and all I can still read at the other corners "
            "is {signs}; how many degrees belong under the smudge?"
        ),
        (
            "So there's this {shape} on a treasure map, the interior angles being {signs} plus one that "
            "the pirates rubbed out. How large is the rubbed-out one?"
        ),
    ),
}
