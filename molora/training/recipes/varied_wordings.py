"""Wordings with alternatives, for training alone: `[a|b]` stands for one of its options, of which one may be empty.

Plain data, which `wordings` and `more_wordings` take up. Every combination asks its domain's task, with all its facts.
"""

_LISTS = (  # Two domains have lists of numbers. How one is brought up must not tell which of them will be asked.
    "[I|A friend] [wrote down|noted|measured|counted] {commas}.",
    "[The prices|The ages|The weights] are [{commas}|{prose}].",
    "[We have|I was given] the [numbers|tickets] [{commas}|{prose}].",
    "[Here are|Below are] [some figures|our results|a few values]: [{commas}|{spaces}].",
    "[On the board|In my notebook|In the file] I find {prose}.",
    "[Look at|Consider|Think of] [{brackets}|{semicolons}].",
    "The [list|input|series] [goes|has]: [{commas}|{brackets}].",
    "[{commas}|{prose}|{semicolons}], [that is what I have|as they came in].",
    "[A machine printed|The survey gave|The kids called out] {semicolons}.",
)


def _after_lists(task: str) -> tuple[str, ...]:
    return tuple(f"{numbers} {task}" for numbers in _LISTS)


VARIED_WORDINGS: dict[str, tuple[str, ...]] = {
    "arithmetic": (
        (
            "[Please compute|Compute|Evaluate|Reckon|Figure out] "
            "[{expression}|this calculation: {expression}|the following: {spoken}][.|!| - just the number.]"
        ),
        (
            "{expression}[\n|\n\n]"
            "[Compute it.|Compute this.|What is this?|Work out the number.|Solve, please.|Evaluate the line above.]"
        ),
        (
            "{expression} [- what does that|- what does it|- what does this all] "
            "[come to|make|give|amount to|add up to][?| please?| in the end?]"
        ),
        "[hey|yo|ok|so] [whats|what is|wats|how much is] {expression}[| pls| please|?|??]",
        (
            "You are a [calculator|pocket calculator|maths tutor|math teacher|bookkeeper|cashier]. "
            "[The input is|Someone types|A pupil asks about|The next entry reads] {expression}. "
            "[What do you show?|What is your output?|What do you reply?|Give the result.]"
        ),
        (
            "[For my homework|For a maths test|For school|For a spreadsheet|For a bill|To check my change] I "
            "[need|want|have to find] the [result|value|answer|outcome] of [{expression}|{spoken}]"
            "[.|, please.|. What is it?|. Can you help?]"
        ),
        (
            "[I start with|I have|My balance is|My score is] {first}. [Now|Next|After that] I {steps}. "
            "[What is the new number?|What do I end up with?|How much is that?|Where do I stand?|"
            "What is my total now?]"
        ),
        (
            "[Adding and subtracting in order|Going from left to right|Step by step|Doing the sums], what is "
            "[{expression}|{spoken}]?"
        ),
        (
            "[{expression}|{spoken}] is [a sum|a calculation|an exercise|an expression] "
            "[that I cannot solve|on my worksheet|I got stuck on|from my textbook]. "
            "[What is the solution?|What is the right answer?|What should I write down?|Help me solve it.]"
        ),
        (
            "[The number|The figure|The amount] {first} is "
            "[given|written on the board|my starting point|where we begin]. [We|You|They] {steps}. "
            "[Which number comes out?|What number results?|What is the outcome?|What remains?]"
        ),
        (
            "What [number|value|figure|integer] is [equal to|the same as|represented by|obtained from] "
            "[{expression}|{spoken}]?"
        ),
        (
            "[The value of|The result of|The answer to] {expression} "
            "[is needed|is wanted|should be computed|has to be found][.| here.| by someone without a calculator.]"
        ),
        (
            '"{expression}" [is written on the blackboard|stood in the exam|is what the receipt says|is on my screen]'
            ". [What does it equal?|What is it equal to?|Which number is that?|Calculate it.]"
        ),
        "[pls|please|plz] [calc|calculate|calcualte|compute|work out]: [{expression}|{spoken}]",
        "{spoken}[?|, how much is that?|, what is that?|: your answer?| is what number?| - answer with one number.]",
        (
            "[Grandma|My brother|The teacher|A friend|My boss] [asked me|wants to know|quizzed me on|keeps asking] "
            "what {expression} [is|equals|makes|comes to]. "
            "[Can you tell me?|What do I say?|Do you know?|Please help.]"
        ),
        (
            "[Do|Perform|Carry out] the [addition or subtraction|arithmetic|computation|calculation] "
            "[below|that follows|here][:|.]\n{expression}"
        ),
        "[Q:|Question:|Problem:|Exercise:] {expression} [Result:|A:|Solution:|Outcome:]",
        (
            "[A shop|A warehouse|A library|A farm] [had|started with|counted] {first} items"
            "[.| at first.| this morning.] "
            "[The clerk was told: {steps}.|Instructions for the count: {steps}.|Then the order was to {steps}.] "
            "[How many items are there now?|What is the new count?|What number is left?]"
        ),
        "[In digits, what|What exactly|What, please,|As a number, what] is {spoken}?",
        (
            "[Without a calculator|In my head|By hand|On paper] I cannot do {expression}"
            "[. Can you?|. What is it?|; what should come out?|. Please solve it.]"
        ),
        "[work this out|figure it out|reckon that up] [for me|please|quickly]: [{expression}|{spoken}]",
        (
            "[Let me know|Say|State|Write down|Give me] [the number that|the value that|what] "
            "[{expression}|{spoken}] [equals|gives|yields|evaluates to]."
        ),
        (
            "If [you|I|we] [enter|type|put|key] {expression} into a calculator, what "
            "[appears|comes up|is displayed|does it show]?"
        ),
        (
            "{first} [to begin with|at the start|is the first number|is what I have][: |; then ]{steps}. "
            "[Result?|Final number?|What is it now?|How much in the end?]"
        ),
    ),
    "words": (
        (
            "[Flip|Reverse|Mirror|Invert|Turn round|Turn around] the [letters|characters|letter order|spelling] of "
            '[{word}|"{word}"|the word {word}|the word "{word}"][.|, please.| for me.|!]'
        ),
        (
            "{word}[\n|\n\n][Spell that backwards.|Write it in reverse.|Reverse it.|Now with the letters reversed.|"
            "The same from the last letter to the first, please.]"
        ),
        (
            '[{word}|"{word}"] '
            "[- what is it backwards|- how is it spelt in reverse|- how do you write it back to front|- and reversed]"
            "[?|??| please?]"
        ),
        (
            "[hey|yo|ok|so] [whats|what is|wats] {word} "
            "[backwards|backward|spelled backwards|in reverse|the other way round]"
        ),
        (
            "You are [a machine|a program|a robot|a function] that "
            "[reverses words|writes words backwards|flips the letters of words|returns strings in reverse]. "
            "[Input|Word|Next word|You receive]: {word}. [What comes out?|What do you print?|Your output?]"
        ),
        (
            "[For my homework|For a riddle|For a crossword|For a quiz|For a birthday card|For a code word] I need "
            "{word} [spelled backwards|with its letters reversed|written from right to left|back to front]"
            "[.|. How is that written?|. Can you do it?]"
        ),
        (
            "[The last letter first|Last letter first|End to start|From the last letter to the first|Right to left], "
            'how [do you|would you|does one] [spell|write] [{word}|"{word}"]?'
        ),
        (
            "[Starting at the end|Going from the last letter to the first|From the tail|"
            'Beginning with the last letter], [write|list|type|give] the letters of [{word}|"{word}"|the word {word}]'
            "."
        ),
        (
            'I [painted|wrote|printed|stamped] the word "{word}" on [glass|a window|a foil|a transparent sheet]. '
            "Seen from behind, its letters run the other way. "
            "[What does it say then?|How does it read?|What is read there?]"
        ),
        (
            "[Tell me|Say|Show me|Let me see|Give me] the "
            "[reverse|reversal|mirror image|backward form|backwards version] of the [word|string|term] "
            "[{word}|\"{word}\"|'{word}']."
        ),
        (
            '[The letters of|The characters in] [{word}|"{word}"] '
            "[should be reversed|are to be put in the opposite order|must be written in reverse|have to be flipped]. "
            "[What results?|What is the result?|What do we get?|How does it look?]"
        ),
        (
            "[My little sister|My friend|A spy|Our teacher] [says|spells|writes] [every word|each word] backwards. "
            '[What becomes of|What happens to|What is made of] [{word}|"{word}"]?'
        ),
        "[pls|please|plz] [reverse|revers|flip|turn round] the [letters|spelling]: {word}",
        "reverse([{word}|\"{word}\"|'{word}'])[| = ?| returns what?| -> ?]",
        (
            'In [Python|JavaScript|code|a program], what [string|text] does [reversing|flipping] "{word}" '
            "[give|produce|return]?"
        ),
        (
            'Reading [{word}|"{word}"|the word {word}] from '
            "[the end to the start|right to left|its last letter to its first|the back], "
            "[what do you see|what appears|which letters do you get|what do I get]?"
        ),
        (
            "[A parrot|A robot|An alien|A wizard] can only [talk|speak|answer] with words "
            "[turned around|spelled backwards|reversed letter by letter]. It wants to say {word}. "
            "[What does it utter?|What do we hear?|What comes out?]"
        ),
        (
            "[Word|Term|Item|Entry]: {word}[; |. |, ]"
            "[backward spelling|spelling in reverse|letters in reverse order|reversed form][:|?| please.]"
        ),
        (
            '[What|Which] string [do you get|results|comes out] if the letter order of [{word}|"{word}"] is '
            "[reversed|flipped|inverted|turned around]?"
        ),
        (
            "[spel|spell|write|type] [{word}|the word {word}] [bakwards|backwards|back to front|in reverse order]"
            "[| pls| for me| real quick]"
        ),
        (
            '"{word}" [is the word|is what I have|was the password|is on the card]. '
            "[Its letters in opposite order are?|Please put its letters in reverse order.|"
            "Spelled from its end, what is it?|Reverse its spelling.]"
        ),
        (
            '[Rewrite|Retype|Copy|Put down] [{word}|"{word}"] [from end to beginning|so that it reads backwards|'
            "with the letters from last to first|in reverse letter order][.|, just the word.|, nothing else.]"
        ),
        (
            '[Could you|Can you|Would you|Will you] [please |kindly |]spell [{word}|"{word}"|the word {word}] '
            "[from the rear|in the opposite direction|from its last letter to its first|back to front][?| for me?]"
        ),
        (
            'An anagram of "{word}" [is made|is formed|arises] by [simply |just |]reversing it. '
            "[Which one?|Which is it?|What is it?|Name it.]"
        ),
        (
            'I [say|call out|whisper|shout] "{word}" and you [answer|reply|respond] with '
            "[the same letters in reverse|it spelled backwards|the reversed word]. [Go!|Ready?|Your turn.|Begin.]"
        ),
    ),
    "family": (
        (
            "{story}[\n|\n\n][Tell me|Say|State|Explain] "
            "[what {a} is to {b}|how {a} is related to {b}|which relative of {b} {a} is][.| in one word.|, please.]"
        ),
        (
            "{story} [Given that|With that in mind|From this|Based on these facts], "
            "[what is {a} to {b}|how is {a} related to {b}|which relation is {a} to {b}|which relative of {b} is {a}]"
            "?"
        ),
        (
            "{story} [For {b}, {a} is|To {b}, {a} is|From {b}'s point of view, {a} is|{b} would introduce {a} as] "
            "[what?|a what?|which relative?|what kind of relative?]"
        ),
        (
            "[{a} and {b} are family.|{a} and {b} are related.|Think of {a} and {b}.] {story} "
            "[What does that make {a} to {b}?|As a relative of {b}, what is {a}?|What is {a}'s relation to {b}?]"
        ),
        "[hey|yo|ok|so] [whats|what is|wats] {a} to {b}[?|??| here?| in the family?] {story}",
        (
            "You are a [genealogist|family historian|notary|registrar]. "
            "[Your client says|The records say|The file reads|You are told]: {story} "
            "[What is {a} to {b}?|Report how {a} is related to {b}.|State the kinship of {a} to {b}.]"
        ),
        (
            "[For my homework|For a family tree|For a quiz|For a wedding speech|For my notes] I "
            "[need to know|must find out|have to say|want to write down] "
            "[what {a} is to {b}|how {a} is related to {b}|what relation {a} has to {b}]. "
            "[Here is the family:|These are the facts:|This is known:|The family:] {story}"
        ),
        "{lines}\n[---\n|\n|][{a} is {b}'s __.|{a} = the ___ of {b}|What is {a} to {b}?|Relation ({a} to {b})?]",
        "{story} [Relation|Kinship|Family tie|Relationship] of {a} [to|with respect to] {b}[?|, please.| in one word?]",
        (
            "{story} [Now imagine|Imagine|Picture] {b} [pointing at|waving at|looking at|hugging] {a} and saying: "
            '"This is my ___." [Which word goes in the gap?|Which word is it?|What does {b} say?]'
        ),
        (
            "[As what is {a} related to {b}?|"
            "Is {a} a parent, a child, a sibling, a spouse or another relative of {b}, and which one?|"
            "What exactly is {a} to {b}?|How, in family words, is {a} related to {b}?] {story}"
        ),
        (
            "{story} [At a reunion|At dinner|On the phone|In court], {b} "
            "[talks about|mentions|refers to|is asked about] {a}. "
            "[Seen from {b}, which family word fits {a}?|What is {a} to {b}?|How is {a} related to {b}?]"
        ),
        (
            "[The relation of {a} to {b}|{a}'s place in {b}'s family|The kinship of {a} to {b}] is "
            "[sought|asked for|to be determined|wanted]. {story}"
        ),
        "[Who's|Whos|Who is] {a} [for|to] {b}, [family-wise|as relatives go|in terms of family]? {story}",
        (
            '"{story}" '
            "[I read this in a letter.|So it says in the diary.|That is all we know.|This is from a chronicle.] "
            "[What was {a} to {b}?|How was {a} related to {b}?|What relative of {b} was {a}?]"
        ),
        "[pls|please|plz] [tell us|say|tell me] how {a} is [related|realted|connected by family] to {b}: {story}",
        (
            "{story} [If {b} sends a card to {a}|If {b} writes a letter to {a}|When {b} gives {a} a present], to "
            "[which relative|what kind of relative|which member of the family] does it go?"
        ),
        (
            "[A family|One family|A household|Our neighbours|Our neighbors]: {story} [Required|Wanted|To find|Asked]"
            ": [what {a} is to {b}|the relation of {a} to {b}|how {a} is related to {b}]."
        ),
        (
            "[Let's see if you can follow this.|Listen.|Pay attention.|Here goes.|Try this.] {story} "
            "[{a} is {b}'s ...?|And what is {a} to {b}?|So how is {a} related to {b}?]"
        ),
        (
            "{story} [Using family words|With a single noun|With one word|In family terms], "
            "[describe|name|say|express] what {a} is to {b}."
        ),
        (
            '{story} {b} [says|explains|tells us]: "{a} is my ___." '
            "[Complete it.|Which word is missing?|Fill the gap.|What did {b} say?]"
        ),
        (
            "[I am confused about|I can't work out|I keep forgetting|I wonder] "
            "[how {a} is related to {b}|what {a} is to {b}]. {story}[ Help?| Can you say?| Please tell me.|]"
        ),
        (
            "[Characters|Cast|People|Family]:\n{lines}\n[Question|Q|Asked|Problem]: "
            "[how is {a} related to {b}?|what is {a} to {b}?|which relative of {b} is {a}?]"
        ),
        (
            "What [relative|relation|family member] of {b} is {a}, [if|given that|when] "
            "[this is true|all this holds|the following is so]? {story}"
        ),
        (
            "[Identify|Determine|Find|Establish|Name] the [family tie|kinship|relationship|relation] "
            "[that {a} bears to {b}|in which {a} stands to {b}][.|, in one word.|, please.] {story}"
        ),
    ),
    "sorting": (
        (
            "[Sort|Order|Arrange|Rank|Line up|Put in order] [{commas}|{prose}|{brackets}|{semicolons}] "
            "[{direction}|so that they go {direction}|with the {first} first][.|, please.| for me.]"
        ),
        (
            "{commas}[\n|\n\n][Sort these {direction}.|Put them in {order} order.|"
            "Sort them with the {first} one first, please.|{order} order, please.|Give them in {change} order.]"
        ),
        (
            "[{commas}|{spaces}|{semicolons}|{brackets}] "
            "[- sorted {direction}|- in {change} order|- ranked, {first} first|- ordered {direction}][?| please| pls]"
        ),
        (
            "[hey|yo|ok|so] [sort|order|arrange|organise|organize] [{commas}|{spaces}|{prose}] "
            "[{direction}|in {order} order|{first} to {last}][| pls| please]"
        ),
        (
            "You are [a sorting machine|a sorting function|a librarian|a clerk|an archivist]. "
            "[You receive|Your input is|The pile holds|You are handed] [{commas}|{prose}|{brackets}]. "
            "[Return the numbers {direction}.|Sort {direction}.|Give them back in {order} order.]"
        ),
        (
            "[For my homework|For a report|For a chart|For school|For the statistics] I need "
            "[{commas}|{prose}|{semicolons}] [sorted|ordered|ranked|arranged] "
            "[{direction}|in {order} order|by size, {first} first][.|. Can you do it?|. How do they go?]"
        ),
        (
            "[My runners finished with|The boxes weigh|The bids are|The jerseys have the numbers|"
            "The lottery numbers are] [{commas}|{prose}]. [List them|Line them up|Write them|Give them to me] "
            "[{direction}|in {order} order|by size, starting with the {first}]."
        ),
        (
            "[Going|Ordered|Ranked] {direction}, [what are|what is the order of|how do you list] "
            "[{commas}|{prose}|{spaces}]?"
        ),
        (
            "[{lines}|{bullets}]\n[---\n|\n|][Sort this {direction}.|{order} order, please|"
            "Same lines in {change} order?|Sort the lines so that the {first} comes first.]"
        ),
        "[Sort|Order|Arrange|Rank] {direction}[:|.]\n[{lines}|{bullets}|{commas}]",
        '[sort|sorted|order]({brackets}, [order|direction]="{order}")[| = ?| returns what?]',
        (
            "[Sort them.|Order these.|Rank these.] The {first} [should|must|has to] "
            "[come first|stand at the start|lead], the {last} [last|at the end]: [{commas}|{spaces}|{semicolons}]"
        ),
        (
            "[The numbers|The values|The figures|The integers] [{commas}|{prose}] "
            "[should be|must be|are to be|have to be] [sorted|ordered|ranked|arranged|placed] "
            "[{direction}|in {order} order]."
        ),
        (
            "What [is|would be] the [right|correct|proper] [sequence|order|succession] of "
            "[{commas}|{prose}|{semicolons}] "
            "[{direction}|when sorted in {change} order|by size with the {first} first]?"
        ),
        "[pls|please|plz|kindly] [sort|srot|order|rank] {order}: [{commas}|{spaces}|{brackets}]",
        (
            "[Mum|My coach|The teacher|My manager|A colleague] [gave me|handed me|sent me] [{commas}|{prose}] and "
            "[wants|expects|asked for] them [{direction}|in {order} order|in {change} order]. "
            "[What do I hand back?|What is the list?|How does it go?|Can you do it?]"
        ),
        (
            "[Unsorted|Before|Raw data|Given]: [{commas}|{brackets}|{spaces}]. [Sorted|After sorting|Put in order] ("
            "[{order}|{direction}|{first} first]):"
        ),
        (
            "Turn [{commas}|{brackets}|{semicolons}] into [a sequence|a list|a row|a series] "
            "[that goes {direction}|in {order} order|of {change} numbers|with {change} values]."
        ),
        (
            "[{first} to {last}|{first} first, {last} last|{order}|{change}]: [{commas}|{prose}|{spaces}]. "
            "[Sort.|Sort it.|Put them in that order.|Order them.]"
        ),
        (
            "Could [you|someone|we] [please |]get [{commas}|{prose}] "
            "[into {order} order|into {change} order|lined up {direction}|sorted {direction}]?"
        ),
        (
            "I [shuffled|mixed up|dropped|scrambled] my [cards|pages|tickets|files], "
            "[numbered|which read|with the numbers] [{commas}|{prose}]. [Put them back|Stack them|Sort them] "
            "{direction}[.|, please.]"
        ),
        (
            "[Which|What] [list|row|sequence] [do you get|results|comes out] [when|if|once] [{commas}|{brackets}] "
            "[is sorted|is ordered|is arranged] {direction}?"
        ),
        (
            "[In a list that goes {direction}|In {change} order|Written {direction}|By size, {first} first], "
            "[the numbers|these numbers|the values] [{commas}|{prose}] [read|are|become]:"
        ),
        (
            "[Read|See|Look at|Take] [{commas}|{prose}|{spaces}]. [Repeat|Write|Say|Give] the [same |]numbers "
            "[{direction}|in {order} order|in {change} order], [nothing else|just the list|separated by commas][.|!]"
        ),
        "{prose}[; |, ][which|what] is the {order} [order|sequence|arrangement] of [these|those|them]?",
        *_after_lists(
            "[Put them|Now give them|I want them|Could you list them] [{direction}|in {order} order], "
            "[please|{first} first]."
        ),
    ),
    "legs": (
        (
            "[Count|Add up|Total|Sum up|Tally] [the legs|all the legs|all legs] of "
            "[{prose}|{commas}|these animals: {commas}][.|, please.| for me.]"
        ),
        (
            "{commas}[\n|\n\n][How many legs is that?|Number of legs?|Count the legs.|Give the leg total.|"
            "What do their legs add up to?]"
        ),
        (
            "[{prose}|{commas}|{plus}] "
            "[- how many legs|- legs in total|- total leg count|- legs altogether|- the number of legs]"
            "[?|??| please?]"
        ),
        "[hey|yo|so|ok] how many legs [on|for|are there with|do you count on] [{prose}|{commas}|{plus}][|?| in total]",
        (
            "You are a [zookeeper|shoemaker for animals|biologist|farmer|ranger]. "
            "[You look after|In front of you are|Today you meet|You have counted] {prose}. "
            "[How many legs are there?|Report the number of legs.|How many legs is that altogether?]"
        ),
        (
            "[For my homework|For biology class|For a riddle|For a quiz|For a picture book], "
            "[tell me|work out|I need|find] the "
            "[total number of legs|leg count|sum of the legs|combined number of legs] of [{prose}|{commas}]."
        ),
        (
            "[The ark|A lorry|A truck|The stable|A cage|Our garden] [holds|contains|is full of|is home to] {prose}. "
            "[How many legs are inside|How many legs are in there|What is the number of legs in it][?|, all in all?]"
        ),
        (
            "[Altogether|In total|All in all|Combined|Taken together], how many legs "
            "[do {prose} have|have {prose} got|are there on {prose}|belong to {prose}]?"
        ),
        (
            "{lines}\n[---\n|\n|]"
            "[Total legs?|How many legs do all of them have?|Sum of their legs, please.|Count their legs.]"
        ),
        "[Count the legs|Leg total|How many legs in all|Add the legs up][:|...]\n{lines}",
        '[count_legs|legs|total_legs]("[{commas}|{plus}|{colons}]")[| = ?| returns what?]',
        (
            "[A child drew|Someone photographed|I dreamt of|We spotted|The camera caught] {prose}"
            "[.| in a meadow.| near the river.] "
            "[How many legs is that|What is the leg count|How many legs were there][?|, in total?]"
        ),
        (
            "[The legs|All legs|The legs they walk on] of [{prose}|{commas}] [are to be|should be|must be] "
            "[counted|added up|totalled|totaled]. [What is the sum?|What is the total?|How many?]"
        ),
        (
            "[Each|Every single] animal [keeps|has] all its legs. [There are|We have|I see] [{prose}|{commas}]. "
            "[Legs in total?|How many legs does that make?|So how many legs?]"
        ),
        "[pls|please|plz] [count|coutn|add up] [the|all] legs: [{commas}|{colons}|{plus}]",
        (
            "[Mum|My coach|The teacher|My daughter|A colleague] [asks|wants to know|asked me] how many legs "
            "[{prose} have|{prose} have in all|there are on {prose}]. [What do I say?|Do you know?|Can you tell me?]"
        ),
        (
            "[Animals|Stock|Census|Zoo list]: [{colons}|{commas}]. [Legs|Leg total|Number of legs|Legs altogether]"
            "[:|?|: ___]"
        ),
        (
            "[Suppose|Say|Imagine|Assume] [there are|we bring together|you meet|a vet treats] {prose}. "
            "[How many legs|What number of legs] [would that be|is that][?| altogether?]"
        ),
        (
            "How many [shoes|boots|socks|slippers] [are needed|must I buy|does it take] "
            "[to cover each leg of|for all the legs of|to dress every leg of] {prose}, one "
            "[a leg|for each leg|per leg]?"
        ),
        (
            "[Thinking of|Looking at|With|Given] [{prose}|{commas}], "
            "[what is the number of legs|how many legs are there|how many legs do you count][?| in the whole group?]"
        ),
        (
            "[Report|State|Give|Name|Write down] [the total number of legs|the leg count|how many legs there are] "
            "for [{prose}|{plus}|{colons}][.|, only the number.|, please.]"
        ),
        "What do the legs of [{prose}|{commas}] [add up to|come to|sum to|amount to]?",
        (
            "[If|When] {prose} [walk by|march past|come to dinner|stand in the snow], how many legs "
            "[is that|do you see|are there][?| in total?]"
        ),
        (
            "[Legs per animal times number of animals|Number of animals times legs each], [summed up|added together]"
            ": what [is it|do you get|results] for [{commas}|{prose}|{plus}]?"
        ),
        (
            '"[{commas}|{prose}|{colons}]" [is on my list|says the sign|was today\'s question|is what I noted]. '
            "[Count the legs.|How many legs would that be?|How many legs are meant, all together?|"
            "Please total the legs.]"
        ),
    ),
    "equations": (
        (
            "[Solve|Work out|Figure out] [{equation}|{starred}|the equation {equation}] "
            "[for {variable}|to find {variable}|and tell me {variable}][.|, please.|!]"
        ),
        (
            "{equation}[\n|\n\n]"
            "[Solve it.|What is {variable}?|Solve for {variable}.|Find the unknown.|Value of {variable}, please.]"
        ),
        (
            "[{equation}|{starred}|{spoken}] "
            "[- what is {variable}|- what number is {variable}|- how big is {variable}|- solve for {variable}]"
            "[?|??|, please]"
        ),
        "[hey|yo|ok|so] [whats|what is|wats] {variable} [if|when|in] [{equation}|{starred}]",
        (
            "You are [an algebra tutor|a maths teacher|an equation solver|a math coach]. "
            "[A pupil shows you|The next equation is|On the board you see|Your student wrote] {equation}. "
            "[What is {variable}?|Give the value of {variable}.|Say what {variable} is.|Solve it.]"
        ),
        (
            "[For my homework|For algebra class|For a test|For school|For my exam] I "
            "[need|must find|have to work out|want] [the value of {variable}|{variable}|the unknown {variable}] "
            "[in|from] [{equation}|{starred}][.|. What is it?|. Can you help?]"
        ),
        (
            "[A secret number|An unknown number|My number|Some number] [was|is] [taken|chosen|picked]. "
            "[If you|When you] {steps}, you get {right}. [Which number is it?|What is the number?|Find it.]"
        ),
        (
            "[I think of|I have in mind|I pick|She chose] a number. "
            "[The rule: {steps}.|Instructions: {steps}.|Now {steps}.] "
            "[The result is {right}.|That makes {right}.|You get {right}.] "
            "[What was the number?|Which number was it?|What did we start with?]"
        ),
        (
            "What [value must {variable} have|value does {variable} need|number must {variable} be|"
            "number should {variable} be] [so that|in order that|if] [{equation}|{starred}|{spoken}]?"
        ),
        (
            "[Isolate|Find|Extract|Determine] {variable}[: | in | in the equation ][{equation}|{starred}]"
            "[.|, and give its value.]"
        ),
        (
            "[The unknown|The variable|The letter] {variable} "
            "[is to be found|should be determined|has to be computed|is wanted], [given that|knowing that|where] "
            "[{equation}|{starred}]."
        ),
        "solve([{equation}|{starred}][|, {variable}])[| = ?| returns what?]",
        (
            '"[{equation}|{starred}]" [is on the blackboard|stands in my book|was in the exam|is the puzzle]. '
            "[What does {variable} equal?|Which number is {variable}?|Solve it for me.|"
            "What does {variable} stand for?]"
        ),
        "[pls|please|plz] [solve|slove|find {variable} in|work out {variable} from]: [{equation}|{starred}]",
        (
            "[My brother|The teacher|A friend|My tutor] [claims|says|told me] "
            "[that {equation}|that {spoken}|{starred}]. [Then what is {variable}?|So which number is {variable}?|"
            "What is {variable}, then?|What must {variable} equal?]"
        ),
        (
            "[Unknown|Variable|Letter]: {variable}. [Equation|Condition|Relation|Given]: [{equation}|{starred}]. "
            "[Value|Solution|Result][:|?]"
        ),
        (
            "Assume [{equation}|{starred}|that {spoken}]. [Deduce|Conclude|Derive|Compute] "
            "[{variable}|the value of {variable}|what {variable} is]."
        ),
        (
            "[By undoing each step|Working backwards|With algebra|By inverse operations], "
            "[find|determine|get|obtain] [{variable}|the number {variable}] from [{equation}|{starred}]."
        ),
        (
            "[Balance the scales:|A balance problem:|Scales in balance:] [{equation}|{spoken}]. "
            "[How much is one {variable}|What does each {variable} weigh|What is the value of one {variable}]?"
        ),
        (
            "[Can|Could|Would] you [please |kindly |]tell me "
            "[what {variable} is|the value of {variable}|which number {variable} stands for] [if|when|given that] "
            "[{equation}|{starred}|{spoken}]?"
        ),
        (
            "[Put|Insert|Substitute|Plug in] [the right number|the correct value|a number] for {variable} "
            "[to make|so as to make] [{equation}|{starred}] [true|correct|hold]. "
            "[Which one?|Which number?|What is it?]"
        ),
        "[The solution|The root] of [{equation}|{starred}] [is which number|is what|would be what][?|, please?]",
        (
            "{right} is what [comes out|I get|you see|results] [when|if] you take [a number|some number|my number] "
            "and {steps}. [Name the number.|What number is that?|Which number did you take?]"
        ),
        (
            "[To get {right}|To arrive at {right}|To reach {right}], I took a number: I had to {steps}. "
            "[What number was it?|Which number did I use?|Find the number.]"
        ),
        (
            "[Tell me|Say|State|Write down|Give me] {variable}[:|, knowing this:] [{equation}|{starred}|{spoken}]"
            "[.|, only the number.]"
        ),
    ),
    "clock": (
        (
            "[Calculate|Compute|Work out|Determine|Figure out] "
            "[the time|how much time passes|how long it is|the hours and minutes] "
            "[from {start} to {end}|between {start} and {end}|from {start} until {end}][.|, please.| for me.]"
        ),
        (
            "{start} [-|to|until|->] {end}[\n|\n\n]"
            "[How much time lies between?|Time elapsed?|How long is that?|Give the duration.]"
        ),
        (
            "[{start} to {end}|{start} - {end}|from {start} till {end}]"
            "[: how long is that|, how much time is that|, what's the duration|, how long does it take]"
            "[?|??| please?]"
        ),
        "[hey|yo|ok|so] how [long|much time] [is it|is there|is that] from {start} [to|till|until|til] {end}",
        (
            "You are a [stopwatch|timekeeper|referee|time clock|station clerk]. "
            "[You start at {start} and stop at {end}.|First reading {start}, second reading {end}.|"
            "Begin: {start}. Finish: {end}.] [What time has run?|How much time went by?|Report the elapsed time.]"
        ),
        (
            "[For my homework|For my payslip|For a report|For the logbook|For school] I [need|want|must know] the "
            "[time|duration|length of time|number of hours and minutes] "
            "[from {start} to {end}|between {start} and {end}]."
        ),
        (
            "[The concert|A lecture|The exam|Our hike|A webinar|The party|The operation] [starts|begins|gets going] "
            "at {start} and [ends|finishes|is over] at {end}. "
            "[How long does it last?|What is its duration?|How much time does it take?|How long is it?]"
        ),
        (
            "[I parked|We rented the boat|She practised|She practiced|He waited|They worked|The machine ran|"
            "The oven was on] from {start} [to|until|till] {end}. "
            "[How long was that|For how long|How much time was that][?|, in hours and minutes?]"
        ),
        "[Start|Begin|From]: {start}\n[End|Stop|Finish]: {end}\n[Elapsed|Time taken|Difference|Length][:|?]",
        (
            "[Clock-in {start}, clock-out {end}|Check-in {start}, check-out {end}|Opening {start}, closing {end}|"
            "Sunrise {start}, sunset {end}|On at {start}, off at {end}]. "
            "[How long in between?|How much time is that?|Time elapsed?|Duration?]"
        ),
        '[duration|elapsed|time_between]("{start}", "{end}")[| = ?| returns what?]',
        (
            "At {start} I [left home|got on the bus|lit the stove|sat down to write], and "
            "[at {end} I was done|at {end} it was over|by {end} I had finished]. "
            "[How long did it take?|How long did I need?|How much time went by?]"
        ),
        (
            "[The time|The interval|The span|The period] [between {start} and {end}|from {start} to {end}] "
            "[is to be|should be|must be] [calculated|measured|worked out|given in hours and minutes]."
        ),
        (
            "[If it is {start} now|Now it's {start}|My watch says {start}], [how long|how much longer|how much time] "
            "[until|till] {end}?"
        ),
        "[pls|please|plz] [calc|calculate|calcualte|tell me] the [time|hours|duration] from {start} to {end}",
        (
            "[Mum|My boss|The teacher|My wife|A friend] [asks|wants to know|asked] how long it [is|takes] from "
            "{start} to {end}. [What do I say?|Can you tell me?|Do you know?|What is right?]"
        ),
        (
            "[A clock|The display|The church clock|My phone] [goes|moves|advances] from {start} to {end}. "
            "[How many hours and minutes is that|How much time has passed|What time span is that|"
            "By how much did it advance]?"
        ),
        (
            "[Subtract|Take away|Take] {start} from {end}"
            "[, as times of day|, reading both as clock times| (hours and minutes)][.|: what is the difference?]"
        ),
        (
            "[A nap|A ride|A bath|A phone call|A shift|A football match] [that began|which started|starting] at "
            "{start} [lasted till|went on until|ended at] {end}. "
            "[Its length?|How long was it?|What was its duration?]"
        ),
        (
            "How [long do I have|much time is left|many hours and minutes remain] if it is {start} and "
            "[the deadline is at|I must leave at|the doors close at|we meet at] {end}?"
        ),
        (
            "[Time difference|Hours and minutes|Length of stay|Travelling time|Traveling time], {start} to {end}"
            "[?|, please.|:]"
        ),
        (
            "[It was {start} when|The clock showed {start} as] "
            "[it all began|the speech started|the storm broke|we set out], and {end} when "
            "[it ended|it was over|everything was done]. "
            "[How long was that?|How much time lies between?|What was the duration?]"
        ),
        (
            "[Say|Tell me|State|Write down|Give me] how [long|much time] it [is|takes] "
            "[from {start} to {end}|to get from {start} to {end} on the clock]"
            "[.|, as hours and minutes.|, nothing else.]"
        ),
        (
            "From {start} [up to|through to|on until] {end}: [elapsed time|total time|time spent|duration]"
            "[?| please.| in hours and minutes.]"
        ),
        (
            "[Timetable|Schedule|Diary entry|Roster|Calendar]: {start} [-|to] {end}. "
            "[How long is the slot|How long is this entry|What is the length of it|How much time is set aside]?"
        ),
    ),
    "filtering": (
        (
            "[Please {do}|I want you to {do}|Now {do}|You should {do}] [the numbers|the values|the figures] {which}"
            "[: | in | from this list: ][{commas}|{brackets}|{semicolons}]"
        ),
        (
            "{commas}[\n|\n\n][Which of them are {kept}?|Of these, {do} those {which}.|"
            "Please {do} the numbers {which}.|What is left if you {do} those {which}?]"
        ),
        (
            "[{commas}|{brackets}|{spaces}|{semicolons}] "
            "[- which are {kept}|- which ones are {kept}|- what remains if you {do} numbers {which}][?|??| please?]"
        ),
        "[hey|yo|ok|so] [{do}|pls {do}|can u {do}] [the ones|numbers|those] {which}: [{commas}|{spaces}|{prose}]",
        (
            "You are a [filter|filter function|sieve|guard|customs officer for numbers]. "
            "[Only numbers that are {kept} may pass.|You let through what is {kept}.|Your rule: x {sign} {limit}.] "
            "[You receive|In come|Your input is] [{commas}|{prose}|{brackets}]. "
            "[What passes?|What do you let through?|Which numbers get past you?]"
        ),
        (
            "[For my homework|For a report|For a chart|For school|For the statistics] I need "
            "[the numbers|those numbers|only the values] [that are {kept}|which are {kept}] [from|out of] "
            "[{commas}|{prose}|{semicolons}]."
        ),
        (
            "[The bids are|The parcels weigh|The players scored|The temperatures were|The rooms measure|"
            "The bills come to] [{commas}|{prose}]. "
            "[Show only those {kept}.|Which are {kept}?|List the ones that are {kept}.|Please {do} the ones {which}.]"
        ),
        (
            "[Drop|Discard|Throw out|Cross out|Delete] all [numbers|values] [except those|but the ones] "
            "[that are {kept}|which are {kept}][: | in | from ][{commas}|{brackets}|{spaces}]"
        ),
        (
            "[{lines}|{bullets}]\n[---\n|\n|][Which of these numbers are {kept}?|Keep what is {kept}, drop the rest.|"
            "Filter: x {sign} {limit}|From these, {do} the numbers {which}.]"
        ),
        (
            "[Filter this|Go through this|Check each line]: "
            "[keep it if it is {kept}|x stays if x {sign} {limit}|{do} numbers {which}][.|:]\n[{lines}|{bullets}]"
        ),
        "filter([{brackets}|{commas}], x {sign} {limit})[| = ?| returns what?]",
        "list(x for x in {brackets} if x {sign} {limit})[| = ?| gives what?]",
        (
            "[The numbers|The values|Those entries] of [{commas}|{brackets}] that are {kept} "
            "[should stay|are to be kept|must remain]; [the others|the rest|all the others] "
            "[go|are to be dropped|must go]. [What remains?|What is left?|What stays?]"
        ),
        (
            "[With|Using] {limit} as the [limit|threshold|cut-off|cutoff|boundary], {do} the "
            "[numbers|values|entries] {which}: [{commas}|{prose}|{brackets}]"
        ),
        "[pls|please|plz] [filtr|filter|sift|screen] [{commas}|{spaces}|{brackets}]: {do} those {which}",
        (
            '[Mum|My boss|The teacher|A client|My manager] [says|told me|wrote]: "{do} the [numbers|ones|figures] '
            '{which}." [The list is|I have|On the list are] [{commas}|{prose}|{brackets}]. '
            "[What is left?|What do I hand in?|What remains?]"
        ),
        (
            "[Condition|Criterion|Rule|Test]: x {sign} {limit}. [Numbers|Data|Candidates|Input]: "
            "[{commas}|{semicolons}|{spaces}]. [Which pass?|Which ones qualify?|What satisfies it?|Output?]"
        ),
        (
            "[Name|Report|Write out|Give me|Extract] [every|each] [number|entry|value] in "
            "[{commas}|{brackets}|{semicolons}] [that is {kept}|which is {kept}|with a value {kept}]"
            "[.|, in the given order.|, nothing else.]"
        ),
        (
            "[Suppose|Say|Imagine] only [numbers|tickets|scores] {kept} [count|are valid|matter]. "
            "[In the list {brackets}, which ones are those?|Find them in {semicolons}.|Which of {prose} are they?]"
        ),
        (
            "[Could|Can|Would] you [please |kindly |]{do} [the numbers|the ones|those] {which} [in|from] "
            "[{commas}|{prose}|{brackets}]?"
        ),
        (
            "[Out of|Among|From|Of] [{commas}|{prose}], [choose|select|pick|take|give] [the numbers|those|the ones] "
            "[that are {kept}|which are {kept}][.|, please.]"
        ),
        (
            "I [wrote down|collected|measured|drew] [{commas}|{prose}]. "
            "[I'd like to {do}|I have to {do}|I was asked to {do}] [those|the ones|the numbers] {which}. "
            "[What does the list look like then?|What is the new list?|Do it for me.]"
        ),
        (
            "What [remains|is left|survives|stays] [of|in] [{commas}|{brackets}|{spaces}] "
            "[once we|when you|after you|if we] {do} the [numbers|values|ones] {which}?"
        ),
        (
            "Test each of [{commas}|{prose}|{brackets}]: is it {kept}? [List|Write down|Return|Give] the ones "
            "[for which the answer is yes|that pass|that are]."
        ),
        (
            "[Copy|Repeat|Rewrite|Return] the list [{commas}|{brackets}|{semicolons}], but {do} "
            "[the elements|the members|the items|the numbers] {which}[.|, leaving the order alone.|, please.]"
        ),
        *_after_lists(
            "[Please {do} the ones {which}.|I'd like to {do} those {which}.|Which of them are {kept}?|"
            "Now {do} what is {which}.|Show only those that are {kept}.]"
        ),
    ),
    "tastes": (
        "[Name|Identify|Find|Point out|Spot] the [person|one|individual] who {asked}[.|, please.|:] {story}",
        (
            '{story}[\n|\n\n][Name the one who {asked}.|Who is it that {asked}?|Which name goes with "{asked}"?|'
            "The person who {asked}:]"
        ),
        (
            "{story} [Which one|Which of these people|Who of them|Which person here|Which of the people] {asked}"
            "[?|??|, then?]"
        ),
        "[hey|yo|ok|so] [who|which person|which one of them] {asked}[?|??] {story}",
        (
            "You are a [detective|matchmaker|party planner|pollster|journalist]. "
            "[Your notes say|The witnesses say|The interviews say|Your file reads]: {story} "
            "[Who {asked}?|Name the person who {asked}.|Which of them {asked}?]"
        ),
        (
            "[For my homework|For a quiz|For a gift list|For a seating plan|For the newsletter] I "
            "[need to know|must find out|want to know|have to say] who {asked}. "
            "[The facts:|This is what I know:|Here are the answers:|My notes:] {story}"
        ),
        (
            "{lines}\n[---\n|\n|]"
            "[{asked} - who?|Who {asked}?|The name, please, of the one who {asked}.|Which of the above {asked}?]"
        ),
        (
            "[One person|Somebody|Someone|One of them] {asked}. "
            "[Who is it|Who is that|What is the name|Who might that be]? {story}"
        ),
        (
            '{story} [{asked}: who?|"{asked}": which person is that?|Whose name belongs to "{asked}"?|'
            "About whom is it said: {asked}?]"
        ),
        (
            "[Likes and dislikes|Tastes|Opinions|A survey|Some gossip]: {story} [Wanted|Asked|To find|Question]: "
            "[who {asked}|the one who {asked}|the name of the person who {asked}][.|?]"
        ),
        (
            "[At the table|At school|In our office|In the club|In the choir], people "
            "[differ|have their tastes|like different things]. {story} "
            "[Who {asked}?|Tell me which of them {asked}.|Do you see who {asked}?]"
        ),
        "[pls|please|plz] [say|tell me|find|tell us] [who|wich person|which person] {asked}: {story}",
        "{story} [The question is|I wonder|Tell me|Please say|Remind me]: who [is it that |]{asked}?",
        (
            '"{story}" [That is what I heard.|So it says in the report.|This was in the paper.|I overheard this.] '
            "[Who {asked}?|Which person {asked}?|So who is said to be the one who {asked}?]"
        ),
        (
            "[My sister|The teacher|A friend|My boss|Grandpa] [asks|wants to know|asked me] who {asked}. {story} "
            "[What do I say?|Whom do I name?|Which name is right?|Who is it?]"
        ),
        (
            "{story} [The person in question|The one I mean|The one I look for|My person] {asked}. "
            "[What is the name?|Name?|Who is it?|Give the name.]"
        ),
        "[Only the name|Just a name|One name|With one name], please: who {asked}? {story}",
        (
            "[The name of the one|The identity of the person|The person] who {asked} is "
            "[wanted|sought|asked for|to be found]. {story}"
        ),
        (
            "{story} [Judging by this|According to the text|From these sentences|As far as we know], "
            "[who|which person|which of them] {asked}?"
        ),
        (
            "[Let me introduce some people.|Meet my friends.|Here is who came.|Listen to this.|I met a few people.] "
            "{story} [Who was it again who {asked}?|Can you recall who {asked}?|And who {asked}?]"
        ),
        "[Could|Can|Would] you [please |kindly |]name the [person|one|individual] who {asked}? {story}",
        "{story} [=>|->|//|--] [who|which one] {asked}[?|]",
        (
            "[People|Guests|Notes|Statements]:\n{lines}\n[Question|Q|Find|Asked]: "
            "[who {asked}?|the one who {asked}|which person {asked}?]"
        ),
        (
            "{story} [I want to invite|I'm buying a gift for|I must call|I'd like to talk to] the one who {asked}. "
            "[Who is that?|Which name?|Whose number do I need?|Who would that be?]"
        ),
        "[Among|Of|Out of] [the people below|these people|the following people], who {asked}? {story}",
    ),
    "angles": (
        (
            "[Find|Calculate|Compute|Determine|Work out|Figure out] the [missing|remaining|unknown|{last}] "
            "[angle|interior angle] of [a|the] {shape} [with angles|whose other angles are|that has the angles] "
            "{signs}[.|, please.|!]"
        ),
        (
            "{signs}[\n|\n\n][These are angles of a {shape}. What is the {last}?|"
            "That is all but one of the angles of a {shape}. The {last}?|"
            "A {shape} has these angles. How big is the {last} one?|Which angle is missing in this {shape}?]"
        ),
        (
            "[{signs}|{degrees}] [in a {shape}|in some {shape}|in my {shape}] "
            "[- what is the {last} angle|- how big is the last angle|- which angle is missing][?|??| please?]"
        ),
        (
            "[hey|yo|ok|so] [whats|what is|wats] the [{last}|last|missing] angle of a {shape} "
            "[with|if the others are] [{signs}|{commas}|{degrees}]"
        ),
        (
            "You are [a geometer|a surveyor|a maths teacher|a carpenter|an architect]. "
            "[Before you lies|You sketch|You measure|A pupil draws] a {shape}; {count} [angles|corners] are "
            "[{signs}|{degrees}]. [What is the {last}?|Give the {last} one.|How large is the {last} one?]"
        ),
        (
            "[For my homework|For geometry class|For a drawing|For a test|For a model] I "
            "[need|must find|have to work out] the [{last}|missing|remaining] angle of a {shape} "
            "[with|that has|whose known angles are] [{signs}|{degrees}]."
        ),
        (
            "[A field|A sail|A window|A table top|A plot of land|A flag] [is shaped like|has the form of|is cut as] "
            "a {shape}. [At {count} corners I measure|In {count} of its corners I find|Known corners:] "
            "[{signs}|{degrees}]. "
            "[What is the angle at the {last} corner?|How big is the {last}?|And the {last} one?]"
        ),
        (
            "{lines}\n[---\n|\n|][{shape}, {last} angle?|What is the {last} angle of this {shape}?|"
            "One angle of the {shape} is missing. Which?|Give the angle that completes the {shape}.]"
        ),
        (
            "[Known angles of a {shape}|A {shape} with these angles|Angles so far in my {shape}]:\n{lines}\n"
            "[Missing one?|How large is the {last}?|What is left for the {last}?]"
        ),
        '[missing_angle|last_angle|angle]("{shape}", {commas})[| = ?| returns what?]',
        (
            "[In degrees|As a number of degrees|Numerically], [how large|how big|how wide] is the {last} angle "
            "[of|in] a {shape} [if|when] the [others|other angles|other {count}] [are|measure] [{prose}|{degrees}]?"
        ),
        (
            "The [angles|corners|interior angles] of a {shape} [read|are|measure] [{commas}|{prose}] degrees"
            "[, and one more is unknown|, and one is missing|, plus one that is hidden]. "
            "[Find it.|What is it?|How large is that one?]"
        ),
        (
            "[One|A single] [corner|angle|vertex] of [my|the|a] {shape} is "
            "[smudged|torn off|hidden|not labelled|unlabeled]. [The other {count} are|The rest are|I can read] "
            "[{signs}|{degrees}]. [What should it be?|How many degrees has it?|Restore it.]"
        ),
        (
            "The angles of a {shape} [add up to a fixed sum|have a known total]. With [{signs}|{degrees}] "
            "[given|used up|known], what [is left for the {last}|remains for the last one]?"
        ),
        (
            "[pls|please|plz] [find|fnid|calc|compute] the [last|missing|{last}] angle: {shape}, "
            "[{signs}|{commas}|{degrees}]"
        ),
        (
            "[My brother|The teacher|A friend|My tutor|My daughter] [drew|has|showed me] a {shape} with "
            "[{signs}|{degrees}]. "
            "[What is its {last} angle?|How big is the angle not mentioned?|Which angle was left out?]"
        ),
        (
            "[Figure|Shape|Polygon]: {shape}. [Given|Known|Angles]: [{signs}|{commas}|{degrees}]. "
            "[Unknown|Wanted|Missing|To find]: [the {last} angle|the remaining angle|one angle]."
        ),
        (
            "[The {last} angle|The remaining angle|The missing angle|The last interior angle] of a {shape} "
            "[is to be|should be|must be] [found|calculated|determined], [given|knowing|where the others are] "
            "{signs}."
        ),
        (
            "[Knowing|Given|Having] {count} angles of a {shape}, [{signs}|{degrees}], "
            "[what is the {last}?|how large is the last one?|find the {last}.|compute the one that is left.]"
        ),
        (
            "[Could|Can|Would] you [please |kindly |]tell me the [{last}|missing|remaining] angle of [a|my] {shape} "
            "[with angles of|that already has] [{signs}|{degrees}]?"
        ),
        (
            "To [close|complete|finish] a {shape} [that has|with] angles of [{signs}|{degrees}], what "
            "[must the {last} angle be|should the {last} one measure|angle do I need]?"
        ),
        (
            "[Say|Tell me|State|Write down|Give me] [how big|how large] the [{last}|last|unknown] angle of a {shape} "
            "is [if|when] {count} are [{signs}|{prose} degrees][.|, only the number.]"
        ),
        (
            "[A robot|A turtle|An ant] [walks along|goes round|traces] a {shape} and notes {count} inner angles: "
            "[{signs}|{commas}|{degrees}]. [What will the {last} be?|Which angle comes last?|What is the {last} one?]"
        ),
        (
            "{shape}: [{commas}|{signs}|{degrees}]. [The {last} angle|Angle that is left|Last angle|Missing angle]"
            "[?|:| please.]"
        ),
        (
            '[Into the blank of|To fill the gap in] "{shape}: [{commas}|{signs}], __" [goes|belongs] which '
            "[angle|number of degrees]?"
        ),
    ),
}
