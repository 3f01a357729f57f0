// In a browser or Node 18 and later: sends a picture as a form does, and prints the verdict.
//   node examples/browser.js examples/digit-7.png http://127.0.0.1:8000
const { readFile } = require('node:fs/promises');

async function score(file, address) {
  const form = new FormData();
  form.append('file', new Blob([file]), 'picture.png'); // in a page: form.append('file', input.files[0])
  const answer = await fetch(`${address}/anomaly-score`, { method: 'POST', body: form });
  const body = await answer.json();
  if (!answer.ok) throw new Error(`${answer.status} ${body.code}: ${body.error}`);
  return body.results[0];
}

readFile(process.argv[2])
  .then((file) => score(file, process.argv[3] ?? 'http://127.0.0.1:8000'))
  .then((verdict) => console.log(`p = ${verdict.p_value}, ${verdict.is_anomaly ? 'an anomaly' : 'normal'}`));
