/* Prompts to begin with: for the adapters that this bank has, or else for any bank.

Knows the names of the demo bank's adapters, and nothing about the page.
*/

const FOR_ADAPTERS = [
  {
    adapters: ["legs", "words"],
    title: "Two tasks in one message",
    prompt:
      "Got two quick ones for you:\n" +
      "i. My daughter drew 8 ducks and 8 bees. How many legs did she have to draw?\n" +
      'ii. Flip the word "winch" for me, last letter first.',
  },
  {
    adapters: ["arithmetic"],
    title: "A sum",
    prompt: "Sorry to bother you, but what would I get if I typed 808 + 599 into a calculator?",
  },
  {
    adapters: ["family"],
    title: "Who is who in a family",
    prompt:
      "Let me tell you about some people. Edward is married to Abigail. They have a child called John. John is " +
      "married to Lily. They have children called William and Ethan. Finn is married to Nova. They have a child " +
      "called Lily. What does that make Nova to Ethan?",
  },
  { adapters: ["sorting"], title: "A list in order", prompt: "Please sort 31, 7, 58 and 12 from smallest to largest." },
];

const FOR_ANY_BANK = [
  { title: "A short text", prompt: "Write two sentences about a lighthouse in the fog." },
  { title: "A plain explanation", prompt: "Why is the sky blue? Explain it to a child in three sentences." },
  { title: "Two tasks in one message", prompt: "First count from one to five, then name three fruits." },
];

const NUM_EXAMPLES = 3;

/** Three examples, as { title, prompt }. */
export function examplesFor(adapters) {
  const known = FOR_ADAPTERS.filter((example) => example.adapters.every((name) => adapters.includes(name)));
  return [...known, ...FOR_ANY_BANK].slice(0, NUM_EXAMPLES);
}
